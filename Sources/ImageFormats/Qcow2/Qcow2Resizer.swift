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
    var image: Qcow2WritableImage
    var refcounts: Qcow2Refcounts
    /// The disk of the backing file; nil if there is none.
    let backing: (any ImageSource)?
    /// The data file; nil if the image holds its data itself.
    let data: (any WritableStorage)?
    /// nil if the image is not encrypted.
    let encryption: Qcow2Encryption?

    var header: Qcow2Header { image.header }
    var geometry: Qcow2Geometry { header.geometry }

    /// Reads all metadata.
    ///
    /// - Throws: `ImageError` for images that have errors, or have parts that resizing would
    ///   damage.
    public init(
        storage: any WritableStorage, header: Qcow2Header, backing: (any ImageSource)?,
        data: (any WritableStorage)? = nil
    ) async throws {
        try await self.init(
            storage: storage, header: header, backing: backing, data: data, encryption: nil)
    }

    init(
        storage: any WritableStorage, header: Qcow2Header, backing: (any ImageSource)?,
        data: (any WritableStorage)?, encryption: Qcow2Encryption?
    ) async throws {
        self.storage = storage
        self.encryption = encryption
        self.backing = backing
        self.data = data
        (image, refcounts) = try await Qcow2WritableImage.sound(storage, header)
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
        let dataSize = data?.size ?? 0
        do {
            if size > geometry.virtualSize {
                try await grow(to: size, preallocation)
            } else {
                try await shrink(to: size)
            }
        } catch {
            if !image.isSwitched {
                try? await refcounts.rollBack()
                try? await data?.truncate(to: dataSize)
            }
            throw error
        }
        // As with qemu-img, the data file ends with the disk.
        try await data?.truncate(to: size)
        try await data?.flush()
        if refcounts.hasNewSingles { try await SoundImage.mendCopiedFlags(storage) }
    }

    // MARK: The switch

    /// Makes the header lead to the new parts (`Qcow2WritableImage.changeHeader`), and adds the old
    /// ones to those to free.
    mutating func perform(_ change: inout Change) async throws {
        try await refcounts.settle()
        let old = header
        let entries = Int64(image.l1.count)
        try await image.changeHeader { [change, place = refcounts.place] in
            $0.geometry.virtualSize = change.size
            $0.l1Offset = change.l1Offset
            $0.l1Entries = entries
            $0.refcountTableOffset = place.offset
            $0.refcountTableClusters = place.clusters
        }
        if header.refcountTableOffset != old.refcountTableOffset {
            change.freed += clusters(
                old.refcountTableOffset, bytes: old.refcountTableClusters * geometry.clusterSize)
        }
        if header.l1Offset != old.l1Offset {
            change.freed += clusters(old.l1Offset, bytes: old.l1Entries * 8)
        }
    }

    private func clusters(_ offset: HostOffset, bytes: Int64) -> Range<Int64> {
        let first = offset.bytes / geometry.clusterSize
        return first..<first + bytes.dividedUp(by: geometry.clusterSize)
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
        let firstTable = min(image.l1.count, Int(firstGone.dividedUp(by: geometry.l2Entries)))
        let boundary = try await boundary(firstGone)
        var change = Change(size: size, l1Offset: header.l1Offset)
        try await perform(&change)

        var tables: [HostOffset] = []
        for index in firstTable..<image.l1.count {
            if let table = try image.tableOffset(Int64(index)) { tables.append(table) }
            image.l1[index] = 0
        }
        if let boundary { change.freed += try await clear(boundary) }
        try await image.writeL1(
            min(firstTable, boundary?.index ?? firstTable)..<image.l1.count)
        try await refcounts.flush()

        try await refcounts.release(change.freed)
        for table in tables {
            let words = try await image.readTable(at: table)
            try await refcounts.release(image.clusters(of: words[...]))
            try await refcounts.release([table.bytes / geometry.clusterSize])
        }
        try await refcounts.releaseEnd()
    }

    /// - Parameter firstGone: index of the first guest cluster behind the new end.
    /// - Returns: nil if no table has to be changed.
    private mutating func boundary(_ firstGone: Int64) async throws -> Boundary? {
        let index = firstGone / geometry.l2Entries
        let word = Int(firstGone % geometry.l2Entries * geometry.wordsPerL2Entry)
        guard word > 0, let host = try image.tableOffset(index) else { return nil }
        let words = try await image.readTable(index)
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
        let freed = image.clusters(of: boundary.words[word...])
        if let copy = boundary.copy {
            image.l1[boundary.index] = UInt64(copy * geometry.clusterSize) | Qcow2Entry.copied
            return freed + [boundary.host.bytes / geometry.clusterSize]
        }
        try await storage.writeBytes(
            [UInt8](repeating: 0, count: (boundary.words.count - word) * 8),
            at: boundary.host.bytes + Int64(word) * 8)
        return freed
    }
}
