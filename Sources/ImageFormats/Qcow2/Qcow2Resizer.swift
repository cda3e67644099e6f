import DiskImage
import ImageStorage

/// Changes the size of a qcow2 image in place.
///
/// Whatever ends the process, a valid image is left, with leaked clusters at worst: new clusters are counted
/// and written before anything leads to them, old ones are freed after nothing does any more.
public struct Qcow2Resizer {
    let storage: any Storage
    let header: Qcow2Header
    /// What lies below the image; nil if nothing does.
    let backing: (any ImageSource)?
    var refcounts: Qcow2Refcounts
    /// All that the header tells of, which can be more than the disk needs.
    var l1: [UInt64]

    var geometry: Qcow2Geometry { header.geometry }

    /// - Throws: `ImageError` for images that are damaged, or hold what resizing would harm.
    public init(
        storage: any Storage, header: Qcow2Header, backing: (any ImageSource)?
    ) async throws {
        let features = header.extras.incompatibleFeatures
        if features & Qcow2Header.IncompatibleFeature.corrupt != 0 {
            throw ImageError.corrupt(
                storage.name, "Image is corrupt; cannot be opened read/write")
        }
        if features & Qcow2Header.IncompatibleFeature.dirty != 0 {
            throw ImageError.unsupported(
                storage.name, "the image was not closed cleanly: repair it first (check -r all)")
        }
        // Bitmaps have the size of the disk.
        if header.extras.autoclearFeatures & Qcow2Header.AutoclearFeature.bitmaps != 0 {
            throw ImageError.unsupported(
                storage.name, "resizing an image with bitmaps is not supported yet")
        }
        self.storage = storage
        self.header = header
        self.backing = backing
        refcounts = try await Qcow2Refcounts(storage: storage, header: header)
        l1 = try await storage.readWords(
            at: header.l1Offset, bytes: header.l1Entries * 8, "L1 table")
    }

    /// - Parameters:
    ///   - size: of the guest disk, in bytes.
    ///   - preallocation: of what is new.
    /// - Throws: `ImageError`, in qemu-img's words where it refuses as well, or `CancellationError`.
    public mutating func resize(to size: Int64, preallocation: Preallocation) async throws {
        guard size % guestSectorSize == 0 else {
            throw ImageError.invalid("The new size must be a multiple of 512")
        }
        guard header.version >= 3 || header.extras.snapshots == 0 else {
            throw ImageError.invalid("Can't resize a v2 image which has snapshots")
        }
        if header.extras.autoclearFeatures != 0 {
            // Who changes an image clears what it does not know (spec, "autoclear_features").
            try await storage.write(
                [UInt8](repeating: 0, count: 8), at: Qcow2Header.FieldOffset.autoclearFeatures)
        }
        if size > geometry.virtualSize {
            try await grow(to: size, preallocation)
        } else if size < geometry.virtualSize {
            try await shrink(to: size)
        }
    }

    /// Of the image with another size.
    func geometry(virtualSize: Int64) -> Qcow2Geometry {
        Qcow2Geometry(
            clusterBits: geometry.clusterBits, hasExtendedL2: geometry.hasExtendedL2,
            virtualSize: virtualSize)
    }

    // MARK: Tables

    /// The L2 table of an L1 entry, in words; zeros where there is none.
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
        try await storage.write(
            Array(l1[indices]).bigEndianBytes,
            at: header.l1Offset.bytes + Int64(indices.lowerBound) * 8)
    }

    func writeSize(_ size: Int64) async throws {
        var field: [UInt8] = []
        field.appendBigEndian(UInt64(size))
        try await storage.write(field, at: Qcow2Header.FieldOffset.virtualSize)
    }

    // MARK: Freeing

    /// The host clusters that L2 entries refer to, each as often as they do.
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

    /// Takes one reference from each cluster and gives back the blocks of those that are free now.
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

    /// Blocks that cannot be given back stay: that harms nobody.
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
    private mutating func shrink(to size: Int64) async throws {
        let firstGone = size.dividedUp(by: geometry.clusterSize)
        let boundary = firstGone / geometry.l2Entries
        var freed: [Int64] = []
        if firstGone % geometry.l2Entries != 0 {
            freed = try await clearTable(
                boundary, from: Int(firstGone % geometry.l2Entries * geometry.wordsPerL2Entry))
        }
        let firstTable = Int(firstGone.dividedUp(by: geometry.l2Entries))
        var tables: [HostOffset] = []
        for index in firstTable..<max(firstTable, l1.count) {
            if let table = try tableOffset(Int64(index)) { tables.append(table) }
            l1[index] = 0
        }
        try await writeL1(min(firstTable, l1.count)..<l1.count)
        try await refcounts.flush()

        try await release(freed)
        for table in tables {
            let words = try await storage.readWords(
                at: table, bytes: geometry.clusterSize, "L2 table")
            try await release(clusters(of: words[...]))
            try await release([table.bytes / geometry.clusterSize])
        }
        try await refcounts.releaseEnd()
        try await writeSize(size)
        try await storage.flush()
    }

    /// Empties the end of an L2 table, in a copy if a snapshot has it, too.
    ///
    /// - Returns: the clusters that have one reference less when all is on stable storage.
    private mutating func clearTable(_ index: Int64, from word: Int) async throws -> [Int64] {
        guard let host = try tableOffset(index) else { return [] }
        var words = try await readTable(index)
        var freed = clusters(of: words[word...])
        guard words[word...].contains(where: { $0 != 0 }) else { return [] }
        for place in word..<words.count { words[place] = 0 }
        if try await refcounts.count(of: host.bytes / geometry.clusterSize) == 1 {
            try await storage.write(
                Array(words[word...]).bigEndianBytes, at: host.bytes + Int64(word) * 8)
            return freed
        }
        let copy = try await refcounts.allocate(1) * geometry.clusterSize
        try await storage.write(words.bigEndianBytes, at: copy)
        try await refcounts.flush()
        l1[Int(index)] = UInt64(copy) | Qcow2Entry.copied
        try await writeL1(Int(index)..<Int(index) + 1)
        freed.append(host.bytes / geometry.clusterSize)
        return freed
    }
}
