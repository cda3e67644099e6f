import DiskImage
import ImageStorage

/// Finds places for new content in an existing image, and brings its tables to disk so that the
/// image is valid at every moment, with leaked clusters at worst.
///
/// A cluster that is used only once is overwritten where it stands. All other content gets free
/// clusters, and the changed L2 entries stay in memory until `commit`, which keeps this order: data
/// and new tables, refcounts, the entries that lead to them, and then the refcounts of what lost
/// its references. A cluster that has lost them is free for other content only afterwards.
///
/// Clusters are taken in the order in which content is placed, so the same calls make the same
/// bytes.
struct Qcow2ImageEditor: ~Copyable, Sendable {
    /// Limits of what a commit brings to disk: L2 tables in bytes, and clusters to free, which take
    /// space until then.
    static let tablesLimit: Int64 = 8 << 20
    private static let droppedLimit = 1 << 18

    private let tablesLimit: Int64
    private var image: Qcow2WritableImage
    private var refcounts: Qcow2Refcounts
    fileprivate var tables: [Int64: Table] = [:]
    /// Host clusters that lose a reference with the next commit, once for each reference.
    private var dropped: [Int64] = []
    /// End of the last compressed cluster, where the next one begins if it fits.
    private var compressedEnd: HostOffset?
    private var stream: CompressedStream
    /// The bitmaps, of which those that record writes are kept up to date.
    private var bitmaps: Qcow2BitmapList
    private let hasBacking: Bool
    /// The data file; nil if the image holds its data itself.
    private let data: (any WritableStorage)?

    /// An L2 table with entries that the file does not have yet.
    fileprivate struct Table {
        var words: [UInt64]
        /// The changed words; empty if the table has only been looked at.
        var changed: Range<Int> = 0..<0
        /// The place of a table that is written anew; nil if it is changed where it stands.
        var newPlace: HostOffset?
    }

    /// - Parameters:
    ///   - data: the data file; nil if the image holds its data itself.
    ///   - hasBacking: whether clusters that are left out show a backing file.
    ///   - tablesLimit: length in bytes of the L2 tables with which a commit is due.
    /// - Throws: `ImageError` for images that have errors, or have parts that changes would damage.
    init(
        _ storage: any WritableStorage, _ header: Qcow2Header, data: (any WritableStorage)?,
        hasBacking: Bool, tablesLimit: Int64 = Self.tablesLimit
    ) async throws {
        var (image, refcounts) = try await Qcow2WritableImage.sound(storage, header)
        try await image.clearUnknownFeatures()
        var bitmaps = try await Qcow2BitmapList(reading: image)
        try await bitmaps.begin(image) { $0.isAuto }
        self.image = image
        self.refcounts = refcounts
        self.bitmaps = bitmaps
        self.data = data
        self.hasBacking = hasBacking
        self.tablesLimit = tablesLimit
        stream = CompressedStream(
            clusterSize: header.geometry.clusterSize, blockSize: storage.traits.blockSize)
    }

    private var geometry: Qcow2Geometry { image.geometry }

    /// Whether memory or space is due to be given back by a commit.
    var isFull: Bool {
        Int64(tables.count) * geometry.clusterSize > tablesLimit
            || dropped.count > Self.droppedLimit
    }
}

// MARK: Placing

extension Qcow2ImageEditor {
    /// Finds a place for each piece.
    ///
    /// - Parameter encoded: the buffer with the compressed clusters.
    mutating func place(
        _ pieces: [EncodedPiece], encoded: RawSpan
    ) async throws -> Placement {
        var placement = Placement()
        for piece in pieces {
            bitmaps.note(piece.guestRange)
            let first = piece.guestRange.lowerBound / geometry.clusterSize
            switch piece.form {
            case .zero:
                let end = piece.guestRange.upperBound.dividedUp(by: geometry.clusterSize)
                try await placeZeros(first..<end, &placement)
            case .plain(let positions):
                try await placePlain(at: first, positions, &placement)
            case .compressed(let positions):
                try await placeCompressed(
                    at: first, encoded.extracting(positions), &placement)
            }
        }
        return placement
    }

    /// Makes guest clusters read as zeros and drops what they hold.
    ///
    /// In a data file, zeros are written as well where a cluster has a place, which takes no space
    /// afterwards, and everywhere in a raw one, which is read without these tables. The old entries
    /// show these zeros, or none of them. An encrypted one keeps what it holds: its zeros would be
    /// noise.
    private mutating func placeZeros(
        _ clusters: Range<Int64>, _ placement: inout Placement
    ) async throws {
        let isRaw = image.header.isDataFileRaw
        if isRaw { clear(clusters, &placement) }
        let clears = !isRaw && image.header.encryptionFormat == nil
        // Version 2 has no zero flag, and gets here only without a backing file.
        let flag = geometry.hasExtendedL2 || image.header.version < 3 ? 0 : Qcow2Entry.zero
        var cluster = clusters.lowerBound
        while cluster < clusters.upperBound {
            let index = cluster / geometry.l2Entries
            let end = min(clusters.upperBound, (index + 1) * geometry.l2Entries)
            if try hasBacking || tables[index] != nil || image.tableOffset(index) != nil {
                try await open(index)
                for cluster in cluster..<end where hasBacking || !isUnallocated(cluster) {
                    if clears, hasPlaceInData(cluster) { clear(cluster..<cluster + 1, &placement) }
                    try await set(cluster, flag, subclusters: Qcow2Entry.allSubclustersZero)
                }
            }
            cluster = end
        }
    }

    /// Makes clusters of the data file read as zeros.
    private func clear(_ clusters: Range<Int64>, _ placement: inout Placement) {
        let start = clusters.lowerBound * geometry.clusterSize
        placement.append(.zeros(Int64(clusters.count) * geometry.clusterSize), at: start)
    }

    private mutating func placePlain(
        at first: Int64, _ positions: Range<Int>, _ placement: inout Placement
    ) async throws {
        let length = Int(geometry.clusterSize)
        let end = first + Int64(positions.count / length)
        var cluster = first
        while cluster < end {
            try await open(cluster / geometry.l2Entries)
            let hosts: Range<Int64>
            let tableEnd = (cluster / geometry.l2Entries + 1) * geometry.l2Entries
            if data != nil {
                hosts = cluster..<min(end, tableEnd)
            } else if let own = ownCluster(cluster) {
                hosts = own..<own + 1
            } else {
                // A new table stands before its data, which stays in one piece.
                try await own(cluster / geometry.l2Entries)
                let behind = (cluster..<min(end, tableEnd)).first { ownCluster($0) != nil }
                hosts = try await refcounts.take(
                    upTo: (behind ?? min(end, tableEnd)) - cluster)
            }
            for host in hosts {
                let start = positions.lowerBound + Int(cluster - first) * length
                let offset = host * geometry.clusterSize
                placement.append(.plain(start..<start + length), at: offset)
                try await set(
                    cluster, UInt64(offset) | Qcow2Entry.copied,
                    subclusters: Qcow2Entry.allSubclustersAllocated)
                cluster += 1
            }
        }
    }

    private mutating func placeCompressed(
        at cluster: Int64, _ bytes: RawSpan, _ placement: inout Placement
    ) async throws {
        try await open(cluster / geometry.l2Entries)
        try await own(cluster / geometry.l2Entries)
        let host = try await takeBytes(Int64(bytes.byteCount))
        let entry = Qcow2CompressedCluster.entry(
            host, length: Int64(bytes.byteCount), geometry)
        try await set(cluster, entry, subclusters: 0)
        try stream.append(bytes, at: host.bytes, to: &placement)
    }

    /// Finds room for a compressed cluster behind the last one, or in a new host cluster.
    private mutating func takeBytes(_ count: Int64) async throws -> HostOffset {
        guard let end = compressedEnd else {
            return setCompressedEnd(behind: try await takeCluster(), count)
        }
        let shared = end.bytes / geometry.clusterSize
        let edge = HostOffset((shared + 1) * geometry.clusterSize)
        if edge - end >= count {
            if try await refcounts.raise([shared]) { return setCompressedEnd(behind: end, count) }
            return setCompressedEnd(behind: try await takeCluster(), count)
        }
        let next = try await takeCluster()
        if next == edge, try await refcounts.raise([shared]) {
            return setCompressedEnd(behind: end, count)
        }
        return setCompressedEnd(behind: next, count)
    }

    private mutating func setCompressedEnd(
        behind start: HostOffset, _ count: Int64
    ) -> HostOffset {
        let end = start + count
        compressedEnd = end.bytes % geometry.clusterSize == 0 ? nil : end
        return start
    }

    private mutating func takeCluster() async throws -> HostOffset {
        HostOffset(try await refcounts.take(upTo: 1).lowerBound * geometry.clusterSize)
    }
}

// MARK: Entries

extension Qcow2ImageEditor {
    /// Reads the L2 table of an L1 entry, unless it is in memory.
    private mutating func open(_ index: Int64) async throws {
        guard tables[index] == nil else { return }
        try MemoryMargin.check(for: 2 * Int(geometry.clusterSize))
        tables[index] = Table(words: try await image.readTable(index))
    }

    /// The place of a guest cluster's entry, whose table is in memory.
    private func place(of cluster: Int64) -> (table: Int64, word: Int) {
        (
            cluster / geometry.l2Entries,
            Int(cluster % geometry.l2Entries * geometry.wordsPerL2Entry)
        )
    }

    private func words(of cluster: Int64) -> ArraySlice<UInt64> {
        let (table, word) = place(of: cluster)
        return tables[table]?.words[word..<word + Int(geometry.wordsPerL2Entry)] ?? []
    }

    private func isUnallocated(_ cluster: Int64) -> Bool {
        words(of: cluster).allSatisfy { $0 == 0 }
    }

    /// Whether a guest cluster has a place in the data file.
    private func hasPlaceInData(_ cluster: Int64) -> Bool {
        guard data != nil, let entry = words(of: cluster).first else { return false }
        // The first one is at offset 0, which only the flag tells from no place.
        return entry & (Qcow2Entry.copied | Qcow2Entry.offsetMask) != 0
    }

    /// Index of the host cluster that a guest cluster has for itself; nil if it has none, or one
    /// that others use, too.
    private func ownCluster(_ cluster: Int64) -> Int64? {
        guard let entry = words(of: cluster).first, entry & Qcow2Entry.copied != 0,
            case let host = Self.host(entry), host != 0
        else { return nil }
        return host / geometry.clusterSize
    }

    /// Offset in bytes of the host cluster of an entry; 0 if it has none, or is compressed.
    private static func host(_ entry: UInt64) -> Int64 {
        entry & Qcow2Entry.compressed == 0 ? Int64(entry & Qcow2Entry.offsetMask) : 0
    }

    /// Changes an entry, and drops the references of the old one.
    private mutating func set(
        _ cluster: Int64, _ entry: UInt64, subclusters: UInt64
    ) async throws {
        let old = words(of: cluster)
        let new = geometry.hasExtendedL2 ? [entry, subclusters] : [entry]
        guard !old.elementsEqual(new) else { return }
        let isKept = Self.host(entry) != 0 && Self.host(entry) == old.first.map(Self.host)
        if !isKept { dropped += image.clusters(of: old) }
        let (index, word) = place(of: cluster)
        try await own(index)
        tables[index]?.set(new, at: word)
    }

    /// Gives a table that is missing, or that a snapshot uses, too, a place of its own.
    private mutating func own(_ index: Int64) async throws {
        guard tables[index]?.newPlace == nil, tables[index]?.changed.isEmpty ?? false,
            !image.isOwnTable(index)
        else { return }
        if let old = try image.tableOffset(index) {
            dropped.append(old.bytes / geometry.clusterSize)
        }
        let place = try await takeCluster()
        tables[index]?.newPlace = place
    }
}

extension Qcow2ImageEditor.Table {
    fileprivate mutating func set(_ new: [UInt64], at word: Int) {
        words.replaceSubrange(word..<word + new.count, with: new)
        let end = word + new.count
        changed =
            changed.isEmpty
            ? word..<end : min(word, changed.lowerBound)..<max(end, changed.upperBound)
    }
}

// MARK: Bringing it to disk

extension Qcow2ImageEditor {
    /// Brings to stable storage what has been placed. All its data must have been written.
    mutating func commit() async throws {
        let storage = try image.writable
        try await data?.flush()
        let changed = tables.filter { !$0.value.changed.isEmpty }.sorted { $0.key < $1.key }
        var new = Placement()
        stream.close(&new)
        for (_, table) in changed {
            guard let place = table.newPlace else { continue }
            new.append(.metadata(table.words.bigEndianBytes), at: place.bytes)
        }
        try await storage.writePlacement(new, data: RawSpan())
        try await refcounts.publish(in: &image)

        var entries = Placement()
        for (index, table) in changed where table.newPlace == nil {
            guard let place = try image.tableOffset(index) else { continue }
            entries.append(
                .metadata(Array(table.words[table.changed]).bigEndianBytes),
                at: place.bytes + Int64(table.changed.lowerBound) * 8)
        }
        try await storage.writePlacement(entries, data: RawSpan())
        for (index, table) in changed {
            guard let place = table.newPlace else { continue }
            image.l1[Int(index)] = UInt64(place.bytes) | Qcow2Entry.copied
            try await image.writeL1(Int(index)..<Int(index) + 1)
        }
        try await storage.flush()
        tables = [:]
        try await releaseDropped()
    }

    private mutating func releaseDropped() async throws {
        try await refcounts.release(dropped.sorted())
        dropped = []
        // The next owner of a freed cluster must not share it with a stream.
        if let end = compressedEnd,
            try await refcounts.count(of: end.bytes / geometry.clusterSize) == 0
        {
            compressedEnd = nil
        }
    }

    /// Commits, and brings bitmaps and the last refcounts to disk.
    mutating func finish() async throws {
        try await commit()
        try await refcounts.flush()
        try await bitmaps.store(in: &image, &refcounts)
    }
}
