import DiskImage
import ImageStorage
import Synchronization

/// The L1 and L2 tables of an image that is read; they turn guest offsets into mappings.
///
/// L2 tables are read in slices and kept in a small cache, so memory does not grow with the image.
/// No lock is held while a slice is read. Two tasks may read the same slice, which does no harm.
final class Qcow2Tables: Sendable {
    /// Largest length of a slice in bytes: a whole table of small clusters, a part of a table of
    /// large ones.
    private static let sliceSize: Int64 = 64 << 10
    /// Limit of the cache in bytes. It has room for the slices that workers read, which are
    /// neighbours, and for some that the walk ahead of them has read. Slices of small clusters may
    /// be read twice.
    private static let cacheSize = 256 << 10
    /// Limits of reading ahead where reading waits, in bytes and in slices.
    private static let aheadSize: Int64 = 1 << 20
    private static let mostAhead: Int64 = 32

    private let storage: any Storage
    private let geometry: Qcow2Geometry
    private let decoder: Qcow2EntryDecoder
    private let l1: [UInt64]
    private let sliceBytes: Int64
    private let cache: Mutex<SliceCache>

    /// Reads the L1 table. A snapshot's table can be too short, because the disk has grown since;
    /// the rest of the disk is unallocated then.
    init(storage: any Storage, header: Qcow2Header) async throws {
        self.storage = storage
        geometry = header.geometry
        decoder = Qcow2EntryDecoder(
            name: storage.name, version: header.version, geometry: header.geometry,
            hasDataFile: header.hasDataFile)
        sliceBytes = min(Self.sliceSize, header.geometry.clusterSize)
        cache = Mutex(SliceCache(capacity: Self.cacheSize / Int(sliceBytes)))
        l1 = try await storage.readWords(
            at: header.l1Offset, bytes: min(header.l1Entries, header.geometry.l1Entries) * 8,
            "L1 table")
    }

    /// The mappings of the disk from `offset` on, as the tables tell them; `limit` is that of
    /// `ImageSource.mappings`.
    func mappings(at offset: Int64, limit: Int64) async throws -> [Mapping] {
        guard let slice = try slice(at: offset) else {
            let end = endOfUnallocated(offset / geometry.l2Coverage, limit)
            return [Mapping(offset..<end, .unallocated)]
        }
        return try decoder.mappings(
            in: try await entries(of: slice, limit: limit), startingAt: slice.range.lowerBound,
            from: offset, limit: limit)
    }

    /// Returns the L2 entries of a slice.
    ///
    /// - Parameter limit: guest offset in bytes up to which the caller will go.
    private func entries(of slice: Slice, limit: Int64) async throws -> [UInt64] {
        if let words = cache.withLock({ $0.find(slice.offset) }) { return words }
        let next = storage.readMeter.isWaiting ? slices(behind: slice, limit: limit) : []
        return try await read(slice, with: next)
    }

    /// The place of a slice in the file, and the guest offsets in bytes that it maps.
    private struct Slice {
        var offset: HostOffset
        var range: Range<Int64>
    }

    /// - Returns: nil if there is no L2 table.
    private func slice(at offset: Int64) throws(ImageError) -> Slice? {
        let table = offset / geometry.l2Coverage
        let entry = table < l1.count ? l1[Int(table)] : 0
        guard let l2Offset = try l2Offset(entry, offset) else { return nil }
        let coverage = sliceBytes / 8 / geometry.wordsPerL2Entry * geometry.clusterSize
        let number = offset % geometry.l2Coverage / coverage
        let start = table * geometry.l2Coverage + number * coverage
        return Slice(offset: l2Offset + number * sliceBytes, range: start..<start + coverage)
    }

    /// Skips L1 entries without a table, so that a terabyte of nothing takes no time.
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

    /// Returns the slices that a walk comes to next and that are not in the cache. A damaged table
    /// ends the list, because the walk will report it.
    private func slices(behind slice: Slice, limit: Int64) -> [Slice] {
        var found: [Slice] = []
        var offset = slice.range.upperBound
        while offset < limit, found.count < min(Self.mostAhead, Self.aheadSize / sliceBytes) {
            do throws(ImageError) {
                guard let next = try self.slice(at: offset) else {
                    offset = endOfUnallocated(offset / geometry.l2Coverage, limit)
                    continue
                }
                if cache.withLock({ $0.find(next.offset) }) == nil { found.append(next) }
                offset = next.range.upperBound
            } catch {
                break
            }
        }
        return found
    }

    /// Reads slices concurrently: where reading waits, they take no longer than one.
    ///
    /// - Parameter others: slices to keep in the cache; errors in them do not matter yet.
    private func read(_ slice: Slice, with others: [Slice]) async throws -> [UInt64] {
        guard !others.isEmpty else { return try await read(slice) }
        cache.withLock { $0.makeRoom(for: others.count + 1) }
        return try await withThrowingTaskGroup(of: Void.self) { group in
            for other in others { group.addTask { _ = try? await self.read(other) } }
            let words = try await read(slice)
            try await group.waitForAll()
            return words
        }
    }

    private func read(_ slice: Slice) async throws -> [UInt64] {
        let words = try await storage.readWords(at: slice.offset, bytes: sliceBytes, "L2 table")
        cache.withLock { $0.insert(words, at: slice.offset) }
        return words
    }
}

/// Slices by host offset. The least recently used ones are dropped first.
private struct SliceCache {
    private struct Item {
        var words: [UInt64]
        var lastUse: UInt64
    }

    private var capacity: Int
    private var items: [HostOffset: Item] = [:]
    private var clock: UInt64 = 0

    init(capacity: Int) { self.capacity = capacity }

    /// Raises the capacity for slices that are about to be read and have to stay until they are
    /// used.
    mutating func makeRoom(for count: Int) { capacity = max(capacity, 2 * count) }

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

    /// Drops the older half at once, so that finding the oldest costs little per insertion.
    private mutating func evict() {
        let uses = items.values.map { $0.lastUse }.sorted()
        let median = uses[uses.count / 2]
        items = items.filter { $0.value.lastUse >= median }
    }
}
