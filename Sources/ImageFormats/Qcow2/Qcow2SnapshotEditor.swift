import DiskImage
import Glibc
import ImageStorage

/// Changes the internal snapshots of qcow2 images.
struct Qcow2ImageSnapshots: SnapshotEditor {
    func create(_ name: [UInt8], in storage: any WritableStorage) async throws {
        var now = timespec()
        clock_gettime(CLOCK_REALTIME, &now)
        let refusal = ImageError(.system(errno: ENOTSUP), "")
        try await edit(storage, refusal) { editor in
            try await editor.create(
                name, time: (UInt32(clamping: now.tv_sec), UInt32(clamping: now.tv_nsec)))
        }
    }

    func apply(_ snapshot: SnapshotName, in storage: any WritableStorage) async throws {
        let refusal = ImageError.invalid("Failed to load snapshot: Operation not supported")
        try await edit(storage, refusal) { editor in
            guard let found = editor.find(snapshot) else {
                throw ImageError.invalid("Failed to load snapshot: No such file or directory")
            }
            try await editor.apply(found)
        }
    }

    func delete(_ snapshot: SnapshotName, in storage: any WritableStorage) async throws {
        let refusal = ImageError.invalid("snapshot not found")
        try await edit(storage, refusal) { editor in
            guard let found = editor.find(snapshot) else { throw refusal }
            try await editor.delete(found)
        }
    }

    /// - Parameter refusal: thrown for images with a data file, whose clusters have no refcounts.
    private func edit(
        _ storage: any WritableStorage, _ refusal: ImageError,
        _ body: (inout Qcow2SnapshotEditor) async throws -> Void
    ) async throws {
        let header = try await Qcow2Header.read(from: storage)
        guard !header.hasDataFile else { throw refusal }
        try await Qcow2SnapshotEditor.edit(storage, header, body)
    }
}

/// Takes, applies and deletes internal snapshots of one image.
///
/// All that changes is written to new places: refcounts, tables whose flags change, the L1 tables,
/// the list of snapshots. One write to the header then leads to all of it, so the image is the old
/// or the new one at every moment, with leaked clusters at worst.
struct Qcow2SnapshotEditor {
    private var image: Qcow2WritableImage
    private var refcounts: Qcow2Refcounts
    private var snapshots: [Qcow2Snapshot]
    private let oldTable: Qcow2Refcounts.Table
    private let oldListSize: Int64

    /// Reads all metadata and makes changes.
    ///
    /// - Parameter isRepair: whether the list of snapshots may be damaged, and the image marked as
    ///   damaged.
    /// - Throws: `ImageError` for images that have errors, and what `body` throws, after which the
    ///   image is the old one unless the header has been switched.
    static func edit(
        _ storage: any WritableStorage, _ header: Qcow2Header, isRepair: Bool = false,
        _ body: (inout Qcow2SnapshotEditor) async throws -> Void
    ) async throws {
        if !isRepair { try header.requireWritable(storage.name) }
        let sound = try await SoundImage(storage, mendsSnapshots: isRepair)
        var editor = try await Qcow2SnapshotEditor(sound, storage)
        do {
            try await body(&editor)
        } catch {
            await editor.rollBack()
            throw error
        }
    }

    private init(_ sound: SoundImage, _ storage: any WritableStorage) async throws {
        (image, refcounts) = try await Qcow2WritableImage.opened(sound, storage)
        snapshots = sound.snapshots
        oldTable = refcounts.place
        oldListSize = sound.snapshotTableSize
        refcounts.deferChanges()
    }

    private var geometry: Qcow2Geometry { image.geometry }
}

// MARK: The changes

extension Qcow2SnapshotEditor {
    /// - Parameters:
    ///   - name: as bytes, not empty.
    ///   - time: since 1970, UTC.
    mutating func create(
        _ name: [UInt8], time: (seconds: UInt32, nanoseconds: UInt32)
    ) async throws {
        guard snapshots.count < Qcow2Snapshot.maximumCount else {
            throw ImageError(.system(errno: EFBIG), Self.text(EFBIG))
        }
        // Every cluster will have two references at least, so no entry keeps its flag.
        var l1 = image.l1
        for index in l1.indices {
            guard let table = try image.tableOffset(Int64(index)) else { continue }
            let words = try await image.readTable(at: table)
            try await raise(image.clusters(of: words[...]))
            l1[index] = UInt64(
                try await replace(table, words, by: withoutFlags(words)).bytes)
            try await raise([Int64(l1[index]) / geometry.clusterSize])
        }
        let copy = try await place(l1)
        snapshots.append(
            Qcow2Snapshot(
                id: newID(), name: name, l1: (copy, Int64(l1.count)),
                diskSize: geometry.virtualSize, time: time))
        try await switchTo(l1)
    }

    mutating func delete(_ snapshot: Qcow2Snapshot) async throws {
        let l1 = try await table(of: snapshot)
        snapshots.removeAll { $0 == snapshot }
        try await release(l1)
        try await refcounts.release(clusters(of: snapshot))
        try await switchTo(try await withFlags(image.l1))
    }

    /// Makes the disk what it was when the snapshot was taken.
    mutating func apply(_ snapshot: Qcow2Snapshot) async throws {
        guard image.header.bitmapDirectory == nil else {
            throw ImageError(.system(errno: EBUSY), "Device has active dirty bitmaps")
        }
        var l1 = try await table(of: snapshot)
        var grown = geometry
        grown.virtualSize = snapshot.diskSize ?? geometry.virtualSize
        guard grown.l1Entries <= Qcow2Header.maximumL1Entries else {
            throw ImageError(.system(errno: EFBIG), Self.text(EFBIG))
        }
        l1.appendZeros(upTo: Int(max(grown.l1Entries, image.header.l1Entries)))
        for entry in l1 {
            guard let table = try tableOffset(entry) else { continue }
            let words = try await image.readTable(at: table)
            try await raise(image.clusters(of: words[...]))
            try await raise([table.bytes / geometry.clusterSize])
        }
        try await release(image.l1)
        try await switchTo(try await withFlags(l1)) { $0.geometry = grown }
    }

    /// Makes a version 2 image one of version 3, which asks for more facts of each snapshot.
    mutating func upgrade() async throws {
        func change(_ header: inout Qcow2Header) {
            header.version = 3
            header.addFeatureNames()
        }
        guard snapshots.contains(where: { !$0.isComplete }) else {
            return try await image.rewriteHeader(change)
        }
        try await rewriteList(change)
    }

    /// Writes the list anew, with the facts that version 3 asks for.
    ///
    /// - Parameter change: other changes of the header, made by the same write.
    mutating func rewriteList(_ change: (inout Qcow2Header) -> Void) async throws {
        snapshots = snapshots.map { $0.completed(diskSize: geometry.virtualSize) }
        try await switchTo(nil, change)
    }

    /// Takes references away that no table has any more. Clusters that are left with one reference
    /// get their flags.
    ///
    /// - Parameter change: other changes of the header, made by the same write.
    mutating func release(
        _ clusters: [Int64], _ change: (inout Qcow2Header) -> Void
    ) async throws {
        try await refcounts.release(clusters)
        try await switchTo(try await withFlags(image.l1), change)
    }

    func find(_ name: SnapshotName) -> Qcow2Snapshot? { name.find(in: snapshots) }

    private func newID() -> [UInt8] {
        let largest = snapshots.compactMap { UInt64(String(decoding: $0.id, as: UTF8.self)) }.max()
        return Array(String((largest ?? 0) + 1).utf8)
    }

    private static func text(_ code: Int32) -> String { String(cString: strerror(code)) }
}

// MARK: References

extension Qcow2SnapshotEditor {
    private func tableOffset(_ entry: UInt64) throws(ImageError) -> HostOffset? {
        let offset = Int64(entry & Qcow2Entry.offsetMask)
        return offset == 0 ? nil : HostOffset(offset)
    }

    private func table(of snapshot: Qcow2Snapshot) async throws -> [UInt64] {
        let header = try image.header.of(snapshot, in: image.storage.name)
        return try await image.storage.readWords(
            at: header.l1Offset, bytes: header.l1Entries * 8, "L1 table of a snapshot")
    }

    private func clusters(of snapshot: Qcow2Snapshot) -> [Int64] {
        clusters(Int64(clamping: snapshot.l1Offset), bytes: snapshot.l1Entries * 8)
    }

    private func clusters(_ offset: Int64, bytes: Int64) -> [Int64] {
        let first = offset / geometry.clusterSize
        return Array(first..<first + bytes.dividedUp(by: geometry.clusterSize))
    }

    private mutating func raise(_ clusters: [Int64]) async throws {
        guard try await refcounts.raise(clusters) else {
            throw ImageError(
                .system(errno: EINVAL), path: image.storage.name,
                "the refcounts of \(image.header.refcountBits) bits cannot count one more snapshot")
        }
    }

    /// Takes a reference away from each cluster that an L1 table leads to.
    private mutating func release(_ l1: [UInt64]) async throws {
        for entry in l1 {
            guard let table = try tableOffset(entry) else { continue }
            let words = try await image.readTable(at: table)
            try await refcounts.release(image.clusters(of: words[...]))
            try await refcounts.release([table.bytes / geometry.clusterSize])
        }
    }
}

// MARK: Flags

extension Qcow2SnapshotEditor {
    private func withoutFlags(_ words: [UInt64]) -> [UInt64] {
        var words = words
        for index in stride(from: 0, to: words.count, by: Int(geometry.wordsPerL2Entry)) {
            words[index] &= ~Qcow2Entry.copied
        }
        return words
    }

    /// Returns the L1 table of the disk with the flags that the new refcounts ask for, in its own
    /// entries and in its L2 tables.
    private mutating func withFlags(_ l1: [UInt64]) async throws -> [UInt64] {
        var l1 = l1
        for index in l1.indices {
            guard let table = try tableOffset(l1[index]) else { continue }
            let words = try await image.readTable(at: table)
            let flagged = try await withFlags(in: words)
            let place = try await replace(table, words, by: flagged)
            let isOwn = try await refcounts.count(of: place.bytes / geometry.clusterSize) == 1
            l1[index] = UInt64(place.bytes) | (isOwn ? Qcow2Entry.copied : 0)
        }
        return l1
    }

    private mutating func withFlags(in words: [UInt64]) async throws -> [UInt64] {
        var words = withoutFlags(words)
        for index in stride(from: 0, to: words.count, by: Int(geometry.wordsPerL2Entry)) {
            let host = Int64(words[index] & Qcow2Entry.offsetMask)
            guard words[index] & Qcow2Entry.compressed == 0, host != 0 else { continue }
            let cluster = host / geometry.clusterSize
            let count =
                if let cached = refcounts.cachedCount(of: cluster) { cached } else {
                    try await refcounts.count(of: cluster)
                }
            if count == 1 { words[index] |= Qcow2Entry.copied }
        }
        return words
    }

    /// Writes an L2 table to a new place if it changes.
    ///
    /// - Returns: the place of the table.
    private mutating func replace(
        _ old: HostOffset, _ words: [UInt64], by new: [UInt64]
    ) async throws -> HostOffset {
        guard new != words else { return old }
        let place = try await refcounts.takeInARow(1) * geometry.clusterSize
        try await image.writable.writeWords(new, at: place)
        try await refcounts.release([old.bytes / geometry.clusterSize])
        return HostOffset(place)
    }
}

// MARK: The switch

extension Qcow2SnapshotEditor {
    private mutating func place(_ l1: [UInt64]) async throws -> HostOffset {
        guard !l1.isEmpty else { return HostOffset(0) }
        let count = (Int64(l1.count) * 8).dividedUp(by: geometry.clusterSize)
        let place = try await refcounts.takeInARow(count) * geometry.clusterSize
        try await image.writable.writeWords(l1, at: place)
        return HostOffset(place)
    }

    private mutating func placeList() async throws -> Int64 {
        guard !snapshots.isEmpty else { return 0 }
        var bytes: [UInt8] = []
        for snapshot in snapshots {
            bytes.appendZeros(upTo: bytes.count.roundedUp(to: 8))
            bytes += snapshot.entry
        }
        let count = Int64(bytes.count).dividedUp(by: geometry.clusterSize)
        let place = try await refcounts.takeInARow(count) * geometry.clusterSize
        try await image.writable.writeBytes(bytes, at: place)
        return place
    }

    /// Makes the header lead to the new refcounts, snapshots and L1 table, and frees the old ones.
    ///
    /// - Parameters:
    ///   - l1: nil leaves the L1 table as it is.
    ///   - change: other changes of the header.
    private mutating func switchTo(
        _ l1: [UInt64]?, _ change: (inout Qcow2Header) -> Void = { _ in }
    ) async throws {
        let old = image.header
        let l1Offset = if let l1 { try await place(l1) } else { old.l1Offset }
        let list = try await placeList()
        if l1 != nil {
            try await refcounts.release(clusters(old.l1Offset.bytes, bytes: old.l1Entries * 8))
        }
        try await refcounts.release(
            clusters(Int64(clamping: old.snapshotTableOffset), bytes: oldListSize))
        try await refcounts.settle()
        var new = old
        new.l1Offset = l1Offset
        if let l1 { new.l1Entries = Int64(l1.count) }
        new.refcountTableOffset = refcounts.place.offset
        new.refcountTableClusters = refcounts.place.clusters
        new.snapshotCount = UInt32(snapshots.count)
        new.snapshotTableOffset = UInt64(list)
        change(&new)
        if new.version == old.version {
            try await image.changeHeader { [new] in $0 = new }
        } else {
            try await image.rewriteHeader { [new] in $0 = new }
        }
        if let l1 { image.l1 = l1 }
        try await refcounts.finishSwitch(from: oldTable)
    }

    /// Undoes what was written before a failure, unless the header has been switched.
    mutating func rollBack() async {
        if !image.isSwitched { try? await refcounts.rollBack() }
    }
}
