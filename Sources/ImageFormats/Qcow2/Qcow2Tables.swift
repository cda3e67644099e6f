import DiskImage
import ImageStorage
import Synchronization

/// The L1 and L2 tables of an image being read: from guest offset to mapping.
///
/// L2 tables are read in slices and kept in a small cache, so memory does not grow with the image.
/// No lock is held while a slice is read; two tasks may read the same one, which harms nobody.
final class Qcow2Tables: Sendable {
    /// Of an L2 table, in bytes: a large read for small clusters' tables, a part of a large one's.
    private static let sliceSize: Int64 = 64 << 10
    /// What the cache may hold, in bytes: the slices that workers are in, neighbours all, and some that
    /// whoever walks ahead of them has looked at. Small clusters' may be read twice.
    private static let cacheSize = 256 << 10

    private let storage: any Storage
    private let geometry: Qcow2Geometry
    let decoder: Qcow2EntryDecoder
    private let l1: [UInt64]
    private let sliceBytes: Int64
    private let cache: Mutex<SliceCache>

    /// Reads the L1 table. One that is short, as a snapshot's can be of a disk that has grown since,
    /// says nothing about the rest.
    init(storage: any Storage, header: Qcow2Header) async throws {
        self.storage = storage
        geometry = header.geometry
        decoder = Qcow2EntryDecoder(
            name: storage.name, version: header.version, geometry: header.geometry)
        sliceBytes = min(Self.sliceSize, header.geometry.clusterSize)
        cache = Mutex(SliceCache(capacity: Self.cacheSize / Int(sliceBytes)))
        l1 = try await storage.readWords(
            at: header.l1Offset, bytes: min(header.l1Entries, header.geometry.l1Entries) * 8,
            "L1 table")
    }

    /// What the disk holds from `offset` on, in one piece, up to `limit`.
    func run(at offset: Int64, limit: Int64) async throws -> Qcow2Run {
        let entries = try await entries(at: offset, limit: limit)
        if entries.words.isEmpty {
            return Qcow2Run(range: offset..<entries.range.upperBound, mapping: .unallocated)
        }
        return try decoder.run(
            in: entries.words, startingAt: entries.range.lowerBound, from: offset, limit: limit)
    }

    /// L2 entries, as many as are read at once.
    struct Entries {
        /// None where there is no L2 table.
        var words: [UInt64]
        /// What they map, or how far there is no table: guest offsets in bytes.
        var range: Range<Int64>
    }

    /// The L2 entries around a guest offset.
    func entries(at offset: Int64, limit: Int64) async throws -> Entries {
        let table = offset / geometry.l2Coverage
        let entry = table < l1.count ? l1[Int(table)] : 0
        guard let l2Offset = try l2Offset(entry, offset) else {
            return Entries(words: [], range: offset..<endOfUnallocated(table, limit))
        }
        let coverage = sliceBytes / 8 / geometry.wordsPerL2Entry * geometry.clusterSize
        let slice = offset % geometry.l2Coverage / coverage
        let start = table * geometry.l2Coverage + slice * coverage
        return Entries(
            words: try await self.slice(at: l2Offset + slice * sliceBytes),
            range: start..<start + coverage)
    }

    /// Skips L1 entries without a table: a terabyte of nothing takes no time.
    private func endOfUnallocated(_ table: Int64, _ limit: Int64) -> Int64 {
        var next = table + 1
        while next < l1.count, next * geometry.l2Coverage < limit,
            l1[Int(next)] & Qcow2Entry.offsetMask == 0
        {
            next += 1
        }
        return next >= l1.count ? limit : min(limit, next * geometry.l2Coverage)
    }

    private func l2Offset(
        _ entry: UInt64, _ guestOffset: Int64
    ) throws(ImageError) -> HostOffset? {
        guard entry & ~(Qcow2Entry.copied | Qcow2Entry.offsetMask) == 0 else {
            throw .corrupt(
                storage.name,
                "bad L1 entry for guest offset \(guestOffset): reserved bits are set")
        }
        let offset = Int64(entry & Qcow2Entry.offsetMask)
        guard offset % geometry.clusterSize == 0 else {
            throw .corrupt(
                storage.name,
                "bad L1 entry for guest offset \(guestOffset): offset \(offset) is not a multiple "
                    + "of the cluster size")
        }
        return offset == 0 ? nil : HostOffset(offset)
    }

    private func slice(at offset: HostOffset) async throws -> [UInt64] {
        if let known = cache.withLock({ $0.find(offset) }) { return known }
        let words = try await storage.readWords(at: offset, bytes: sliceBytes, "L2 table")
        cache.withLock { $0.insert(words, at: offset) }
        return words
    }
}

/// Slices by host offset; the ones used longest ago go first.
private struct SliceCache {
    private struct Item {
        var words: [UInt64]
        var lastUse: UInt64
    }

    private let capacity: Int
    private var items: [HostOffset: Item] = [:]
    private var clock: UInt64 = 0

    init(capacity: Int) { self.capacity = capacity }

    mutating func find(_ offset: HostOffset) -> [UInt64]? {
        clock += 1
        guard let position = items.index(forKey: offset) else { return nil }
        items.values[position].lastUse = clock
        return items.values[position].words
    }

    mutating func insert(_ words: [UInt64], at offset: HostOffset) {
        if items.count >= capacity { evict() }
        clock += 1
        items[offset] = Item(words: words, lastUse: clock)
    }

    /// Drops the older half at once, so that looking for the oldest costs little per insertion.
    private mutating func evict() {
        let uses = items.values.map { $0.lastUse }.sorted()
        let median = uses[uses.count / 2]
        items = items.filter { $0.value.lastUse >= median }
    }
}
