import DiskImage
import ImageStorage

/// Changes the size of a qcow2 image in place, by the rule of docs/architecture.md ("Changing an
/// image in place"). It reads everything that it will touch, writes the new parts to space that
/// nothing names, switches to them by one write to the header, and then frees what is no longer
/// needed.
///
/// Whenever the process ends, it leaves a valid image, with leaked clusters at worst.
public struct Qcow2Resizer {
    /// The result of a resize: new values of header fields, and the clusters to free.
    struct Change {
        /// The new size of the guest disk, in bytes.
        let size: Int64
        var l1Offset: HostOffset
        /// Host clusters that have one reference less after the switch, once for each reference.
        var freed: [Int64] = []
    }

    let storage: any WritableStorage
    let header: Qcow2Header
    /// The disk of the backing file; nil if there is none.
    let backing: (any ImageSource)?
    var refcounts: Qcow2Refcounts
    /// All entries that the header names, which can be more than the disk needs.
    var l1: [UInt64]
    /// Whether the header on disk may lead to the new parts.
    private var isSwitched = false

    var geometry: Qcow2Geometry { header.geometry }

    /// Reads all metadata.
    ///
    /// - Throws: `ImageError` for images that have errors, or have parts that resizing would
    ///   damage.
    public init(
        storage: any WritableStorage, header: Qcow2Header, backing: (any ImageSource)?
    ) async throws {
        let features = header.incompatibleFeatures
        if features & Qcow2Header.IncompatibleFeature.corrupt != 0 {
            throw ImageError.corrupt(
                storage.name, "Image is corrupt; cannot be opened read/write")
        }
        if features & Qcow2Header.IncompatibleFeature.dirty != 0 {
            throw ImageError.unsupported(
                storage.name, "the image was not closed cleanly: repair it first (check -r all)")
        }
        // Bitmaps cover the whole disk, so they would have to be resized, too.
        if header.autoclearFeatures & Qcow2Header.AutoclearFeature.bitmaps != 0 {
            throw ImageError.unsupported(
                storage.name, "resizing an image with bitmaps is not supported yet")
        }
        self.storage = storage
        self.header = header
        self.backing = backing
        refcounts = try Qcow2Refcounts(try await SoundImage(storage), storage: storage)
        l1 = try await storage.readWords(
            at: header.l1Offset, bytes: header.l1Entries * 8, "L1 table")
        for index in l1.indices {
            guard let table = try tableOffset(Int64(index)) else { continue }
            guard table.bytes <= storage.size - geometry.clusterSize else {
                throw ImageError.corrupt(
                    storage.name,
                    "the L2 table at offset \(table.bytes) lies beyond the end of the file "
                        + "(\(storage.size) bytes): the image is cut short or damaged")
            }
        }
    }

    /// - Parameters:
    ///   - size: new size of the guest disk in bytes.
    ///   - preallocation: mode for the new part of the disk.
    /// - Throws: `ImageError`, in qemu-img's words where qemu-img refuses as well, or
    ///   `CancellationError`. Before the header has been written, an error leaves the disk and the
    ///   length of the file as they were.
    public mutating func resize(to size: Int64, preallocation: Preallocation) async throws {
        guard size % guestSectorSize == 0 else {
            throw ImageError.invalid("The new size must be a multiple of 512")
        }
        guard header.version >= 3 || header.snapshotCount == 0 else {
            throw ImageError.invalid("Can't resize a v2 image which has snapshots")
        }
        guard size != geometry.virtualSize else { return }
        do {
            if size > geometry.virtualSize {
                try await grow(to: size, preallocation)
            } else {
                try await shrink(to: size)
            }
        } catch {
            if !isSwitched { try? await refcounts.rollBack() }
            throw error
        }
        if refcounts.hasNewSingles { try await SoundImage.mendCopiedFlags(storage) }
    }

    // MARK: Tables

    /// Reads the L2 table of an L1 entry as words; zeros if there is no table.
    func readTable(_ index: Int64) async throws -> [UInt64] {
        guard let host = try tableOffset(index) else {
            return [UInt64](repeating: 0, count: Int(geometry.clusterSize / 8))
        }
        return try await storage.readWords(at: host, bytes: geometry.clusterSize, "L2 table")
    }

    func tableOffset(_ index: Int64) throws(ImageError) -> HostOffset? {
        guard index < l1.count else { return nil }
        let entry = l1[Int(index)]
        let offset = Int64(entry & Qcow2Entry.offsetMask)
        guard entry & ~(Qcow2Entry.copied | Qcow2Entry.offsetMask) == 0,
            offset % geometry.clusterSize == 0
        else { throw .corrupt(storage.name, "L1 entry \(index) is invalid") }
        return offset == 0 ? nil : HostOffset(offset)
    }

    func writeL1(_ indices: Range<Int>) async throws {
        guard !indices.isEmpty else { return }
        try await storage.writeWords(
            Array(l1[indices]),
            at: header.l1Offset.bytes + Int64(indices.lowerBound) * 8)
    }

    // MARK: The switch

    /// Brings the new parts to stable storage and makes the header lead to them by one write within
    /// a sector.
    ///
    /// - Throws: `ImageError`. If the header cannot be written, the old one is restored, so that
    ///   the new parts can be taken back. If that fails as well, either header may be on disk, and
    ///   both lead to a valid image.
    mutating func perform(_ change: inout Change) async throws {
        let oldTable = refcounts.place
        try await refcounts.settle()
        var new = header
        new.geometry.virtualSize = change.size
        new.l1Offset = change.l1Offset
        new.l1Entries = Int64(l1.count)
        new.refcountTableOffset = refcounts.place.offset
        new.refcountTableClusters = refcounts.place.clusters
        // Who changes an image clears what it does not know (spec, "autoclear_features").
        new.autoclearFeatures = 0
        isSwitched = true
        do {
            try await storage.changeHeader(to: new)
        } catch {
            if (try? await storage.changeHeader(to: header)) != nil { isSwitched = false }
            throw error
        }
        if refcounts.place != oldTable {
            change.freed += clusters(
                oldTable.offset, bytes: oldTable.clusters * geometry.clusterSize)
        }
        if change.l1Offset != header.l1Offset {
            change.freed += clusters(header.l1Offset, bytes: header.l1Entries * 8)
        }
    }

    private func clusters(_ offset: HostOffset, bytes: Int64) -> Range<Int64> {
        let first = offset.bytes / geometry.clusterSize
        return first..<first + bytes.dividedUp(by: geometry.clusterSize)
    }

    // MARK: Freeing

    /// The host clusters that L2 entries refer to, once for each reference.
    func clusters(of words: ArraySlice<UInt64>) -> [Int64] {
        var found: [Int64] = []
        let step = Int(geometry.wordsPerL2Entry)
        for index in stride(from: words.startIndex, to: words.endIndex, by: step) {
            let entry = words[index]
            if entry & Qcow2Entry.compressed != 0 {
                let stream = Qcow2CompressedCluster(entry: entry, geometry)
                let last = stream.host.bytes + stream.maximumLength - 1
                found += stream.host.bytes / geometry.clusterSize...last / geometry.clusterSize
            } else if entry & Qcow2Entry.offsetMask != 0 {
                found.append(Int64(entry & Qcow2Entry.offsetMask) / geometry.clusterSize)
            }
        }
        return found
    }

    /// Takes one reference from each cluster and gives back the blocks of those that become free.
    mutating func release(_ clusters: [Int64]) async throws {
        var run: Range<Int64>?
        for cluster in clusters {
            guard try await refcounts.lower(cluster) else { continue }
            if let open = run, open.upperBound == cluster {
                run = open.lowerBound..<cluster + 1
            } else {
                await discard(run)
                run = cluster..<cluster + 1
            }
        }
        await discard(run)
    }

    /// Gives back the blocks of clusters. Blocks that cannot be given back stay, which does no
    /// harm.
    private func discard(_ clusters: Range<Int64>?) async {
        guard let clusters, !storage.traits.isDevice else { return }
        let end = min(clusters.upperBound * geometry.clusterSize, storage.size)
        let start = clusters.lowerBound * geometry.clusterSize
        guard start < end else { return }
        try? await storage.zero(start..<end, mayUnmap: true)
    }
}

// MARK: Shrinking

extension Qcow2Resizer {
    /// The L2 table in which the disk will end.
    private struct Boundary {
        let index: Int
        let host: HostOffset
        /// Index of the first word behind the new end; it and its successors become meaningless.
        let firstGone: Int
        let words: [UInt64]
        /// The cluster of a copy without these words, if a snapshot shares the table.
        var copy: Int64?
    }

    /// Makes the disk shorter. The size is written first: entries behind the end then mean nothing,
    /// however far they have been cleared.
    private mutating func shrink(to size: Int64) async throws {
        let firstGone = size.dividedUp(by: geometry.clusterSize)
        let firstTable = min(l1.count, Int(firstGone.dividedUp(by: geometry.l2Entries)))
        let boundary = try await boundary(firstGone)
        var change = Change(size: size, l1Offset: header.l1Offset)
        try await perform(&change)

        var tables: [HostOffset] = []
        for index in firstTable..<l1.count {
            if let table = try tableOffset(Int64(index)) { tables.append(table) }
            l1[index] = 0
        }
        if let boundary { change.freed += try await clear(boundary) }
        try await writeL1(min(firstTable, boundary?.index ?? firstTable)..<l1.count)
        try await refcounts.flush()

        try await release(change.freed)
        for table in tables {
            let words = try await storage.readWords(
                at: table, bytes: geometry.clusterSize, "L2 table")
            try await release(clusters(of: words[...]))
            try await release([table.bytes / geometry.clusterSize])
        }
        try await refcounts.releaseEnd()
    }

    /// - Parameter firstGone: index of the first guest cluster behind the new end.
    /// - Returns: nil if no table has to be changed.
    private mutating func boundary(_ firstGone: Int64) async throws -> Boundary? {
        let index = firstGone / geometry.l2Entries
        let word = Int(firstGone % geometry.l2Entries * geometry.wordsPerL2Entry)
        guard word > 0, let host = try tableOffset(index) else { return nil }
        let words = try await readTable(index)
        guard words[word...].contains(where: { $0 != 0 }) else { return nil }
        var boundary = Boundary(index: Int(index), host: host, firstGone: word, words: words)
        if try await refcounts.count(of: host.bytes / geometry.clusterSize) > 1 {
            let copy = try await refcounts.allocate(1)
            let kept = words[..<word] + repeatElement(0, count: words.count - word)
            try await storage.writeWords(
                Array(kept), at: copy * geometry.clusterSize)
            boundary.copy = copy
        }
        return boundary
    }

    /// Removes the entries behind the end.
    ///
    /// - Returns: clusters that have one reference less once everything is on stable storage.
    private mutating func clear(_ boundary: Boundary) async throws -> [Int64] {
        let word = boundary.firstGone
        let freed = clusters(of: boundary.words[word...])
        if let copy = boundary.copy {
            l1[boundary.index] = UInt64(copy * geometry.clusterSize) | Qcow2Entry.copied
            return freed + [boundary.host.bytes / geometry.clusterSize]
        }
        try await storage.writeBytes(
            [UInt8](repeating: 0, count: (boundary.words.count - word) * 8),
            at: boundary.host.bytes + Int64(word) * 8)
        return freed
    }
}
