import DiskImage
import Glibc
import ImageStorage

/// The reference counts of an image that is changed in place.
///
/// What is written is safe in this order only: counts are raised (`allocate`, `flush`) before anything
/// leads to the clusters, and lowered after nothing does any more. Whenever the process ends, a count
/// is too high at worst: a leak.
struct Qcow2Refcounts {
    private struct CachedBlock {
        var block: Qcow2RefcountBlock
        var isDirty = false
        var lastUse = 0
    }

    /// What the cache may hold, in bytes; four blocks in any case.
    private static let cacheSize: Int64 = 8 << 20

    private let storage: any Storage
    private let clusterSize: Int64
    private let bits: Int
    private let clustersPerBlock: Int64
    private var tableOffset: HostOffset
    /// Where each block lies; 0 where there is none.
    private var table: [UInt64]
    private var cache: [Int: CachedBlock] = [:]
    private var clock = 0
    /// The first cluster behind everything: where new ones are taken.
    private(set) var end: Int64 = 0
    /// What was handed out, for `undoAllocations`.
    private var handedOut: [Range<Int64>] = []
    /// What is in memory is what is in the image, or will be after a flush. Not so within an allocation,
    /// and after one that failed.
    private var isConsistent = true

    init(storage: any Storage, header: Qcow2Header) async throws {
        self.storage = storage
        clusterSize = header.geometry.clusterSize
        bits = header.extras.refcountBits
        clustersPerBlock = clusterSize * 8 / Int64(bits)
        tableOffset = header.refcountTableOffset
        let bytes = header.refcountTableClusters * clusterSize
        guard bytes > 0, bytes <= Qcow2Layout.maximumRefcountTable,
            tableOffset.bytes > 0, tableOffset.bytes % clusterSize == 0
        else { throw Self.damaged(storage, "the refcount table is invalid") }
        table = try await storage.readWords(at: tableOffset, bytes: bytes, "refcount table")
        let mask = ~UInt64(clusterSize - 1)
        guard table.allSatisfy({ $0 & mask == $0 && $0 < UInt64(Int64.max) }) else {
            throw Self.damaged(storage, "an entry of the refcount table is invalid")
        }
        end = try await firstFreeAtEnd()
    }

    private static func damaged(_ storage: any Storage, _ message: String) -> ImageError {
        .corrupt(storage.name, "\(message): try to repair the image (check -r)")
    }

    // MARK: Counts

    mutating func count(of cluster: Int64) async throws -> UInt64 {
        guard hasBlock(for: cluster) else { return 0 }
        let index = Int(cluster / clustersPerBlock)
        try await load(index)
        return cache[index]?.block[Int(cluster % clustersPerBlock)] ?? 0
    }

    private func hasBlock(for cluster: Int64) -> Bool {
        let index = cluster / clustersPerBlock
        return index < table.count && table[Int(index)] != 0
    }

    /// Takes one reference away.
    ///
    /// - Returns: whether the cluster is free now.
    mutating func lower(_ cluster: Int64) async throws -> Bool {
        let count = try await count(of: cluster)
        guard count > 0 else {
            throw Self.damaged(storage, "cluster \(cluster) is in use, its refcount is 0")
        }
        set(cluster, to: count - 1)
        return count == 1
    }

    private mutating func set(_ cluster: Int64, to count: UInt64) {
        let index = Int(cluster / clustersPerBlock)
        cache[index]?.block[Int(cluster % clustersPerBlock)] = count
        cache[index]?.isDirty = true
    }

    private mutating func load(_ index: Int) async throws {
        clock += 1
        if cache[index] == nil {
            try await makeRoom()
            let words = try await storage.readBytes(
                at: HostOffset(Int64(table[index])), count: clusterSize, "refcount block")
            cache[index] = CachedBlock(block: Qcow2RefcountBlock(bits: bits, bytes: words))
        }
        cache[index]?.lastUse = clock
    }

    private mutating func makeRoom() async throws {
        guard cache.count >= max(4, Int(Self.cacheSize / clusterSize)),
            let oldest = cache.min(by: { $0.value.lastUse < $1.value.lastUse })
        else { return }
        try await write(oldest.key)
        cache[oldest.key] = nil
    }

    private mutating func write(_ index: Int) async throws {
        guard let cached = cache[index], cached.isDirty else { return }
        try await storage.write(cached.block.bytes, at: Int64(table[index]))
        cache[index]?.isDirty = false
    }

    /// Writes what has changed; returns when it is on stable storage, with all that was written before.
    mutating func flush() async throws {
        for index in cache.keys.sorted() { try await write(index) }
        try await storage.flush()
    }

    // MARK: Allocation

    /// Takes clusters in one piece behind the end of the image, each with a count of 1.
    ///
    /// - Returns: the first of them.
    mutating func allocate(_ count: Int64) async throws -> Int64 {
        isConsistent = false
        let room = try roomNeeded(count)
        let start = end
        let firstBlock = start + room.tableClusters
        let first = firstBlock + Int64(room.blocks.count)
        let newEnd = first + count
        guard newEnd <= largestDiskSize / clusterSize else {
            throw ImageError.tooLarge("the image grows", path: storage.name)
        }
        if storage.traits.isDevice, newEnd > storage.size / clusterSize {
            throw ImageError(
                .system(errno: ENOSPC), path: storage.name,
                "the device is too small: \(String(cString: strerror(ENOSPC)))")
        }
        if room.tableClusters > 0 {
            let entries = Int(room.tableClusters * clusterSize / 8)
            table.append(contentsOf: repeatElement(0, count: entries - table.count))
        }
        for (place, index) in room.blocks.enumerated() {
            try await makeRoom()
            table[index] = UInt64((firstBlock + Int64(place)) * clusterSize)
            cache[index] = CachedBlock(
                block: Qcow2RefcountBlock(bits: bits, byteCount: Int(clusterSize)),
                isDirty: true, lastUse: clock)
        }
        var next = start
        while next < newEnd {
            let index = next / clustersPerBlock
            let stop = min(newEnd, (index + 1) * clustersPerBlock)
            try await load(Int(index))
            try take(next..<stop, in: Int(index))
            next = stop
        }
        end = newEnd
        try await publish(room, tableAt: HostOffset(start * clusterSize))
        handedOut.append(first..<newEnd)
        isConsistent = true
        return first
    }

    /// Counts clusters of one block's range that must be free.
    private mutating func take(_ clusters: Range<Int64>, in index: Int) throws(ImageError) {
        guard var cached = cache.removeValue(forKey: index) else { return }
        for cluster in clusters {
            let place = Int(cluster % clustersPerBlock)
            guard cached.block[place] == 0 else {
                throw Self.damaged(storage, "cluster \(cluster) behind the end is in use")
            }
            cached.block[place] = 1
        }
        cached.isDirty = true
        cache[index] = cached
    }

    private struct Room {
        /// Of a new table; 0 if the old one is large enough.
        var tableClusters: Int64 = 0
        /// The blocks that are missing.
        var blocks: [Int] = []
    }

    /// New blocks and a new table have to be counted, too: looks for what suffices for all of it.
    private func roomNeeded(_ count: Int64) throws(ImageError) -> Room {
        var room = Room()
        while true {
            let total = room.tableClusters + Int64(room.blocks.count) + count
            let lastBlock = Int((end + total - 1) / clustersPerBlock)
            let missing = (Int(end / clustersPerBlock)...lastBlock).filter {
                $0 >= table.count || table[$0] == 0
            }
            var tableClusters = room.tableClusters
            if lastBlock >= max(table.count, Int(tableClusters * clusterSize / 8)) {
                let needed = (Int64(lastBlock + 1) * 8).dividedUp(by: clusterSize)
                // Some more, so that it need not move again soon.
                tableClusters = min(
                    needed + needed / 2, Qcow2Layout.maximumRefcountTable / clusterSize)
                guard tableClusters >= needed else {
                    throw ImageError(
                        .invalid, path: storage.name,
                        "the image grows too large for clusters of \(clusterSize) bytes")
                }
            }
            if missing.count == room.blocks.count, tableClusters == room.tableClusters {
                return Room(tableClusters: tableClusters, blocks: missing)
            }
            room = Room(tableClusters: tableClusters, blocks: missing)
        }
    }

    /// Makes new blocks known: first they are written, then what leads to them.
    private mutating func publish(_ room: Room, tableAt newOffset: HostOffset) async throws {
        guard !room.blocks.isEmpty else { return }
        try await flush()
        guard room.tableClusters > 0 else {
            for index in room.blocks {
                try await storage.write(
                    [UInt64]([table[index]]).bigEndianBytes,
                    at: tableOffset.bytes + Int64(index) * 8)
            }
            return
        }
        let oldTable = tableOffset.bytes / clusterSize
        let oldClusters = try await storage.readBytes(
            at: HostOffset(Qcow2Header.FieldOffset.refcountTableClusters), count: 4, "header")
        try await storage.write(table.bigEndianBytes, at: newOffset.bytes)
        try await storage.flush()
        var field: [UInt8] = []
        field.appendBigEndian(UInt64(newOffset.bytes))
        field.appendBigEndian(UInt32(room.tableClusters))
        try await storage.write(field, at: Qcow2Header.FieldOffset.refcountTable)
        try await storage.flush()
        tableOffset = newOffset
        let count = oldClusters.reduce(Int64(0)) { $0 << 8 | Int64($1) }
        for cluster in oldTable..<oldTable + count { _ = try await lower(cluster) }
    }

    /// Frees all that was handed out, as far as that works: nothing leads to it.
    mutating func undoAllocations() async throws {
        guard isConsistent else { return }
        for run in handedOut {
            for cluster in run { _ = try await lower(cluster) }
        }
        handedOut = []
        try await releaseEnd()
    }

    // MARK: The end

    /// Gives up the blocks that count nothing any more, and cuts a file behind its last cluster.
    mutating func releaseEnd() async throws {
        try await flush()
        // From the end on: a block lies in the range of the one before it as a rule.
        var dropped: Set<Int64> = []
        var indices: [Int] = []
        for index in table.indices.reversed() where table[index] != 0 {
            let own = Int64(table[index]) / clusterSize
            let isNew = dropped.insert(own).inserted
            if try await lastUsed(in: index, except: dropped) == nil {
                indices.append(index)
            } else if isNew {
                dropped.remove(own)
            }
        }
        for index in indices {
            try await storage.write([UInt8](repeating: 0, count: 8), at: entryOffset(index))
            table[index] = 0
            cache[index] = nil
        }
        try await storage.flush()
        for cluster in dropped where hasBlock(for: cluster) { _ = try await lower(cluster) }
        try await flush()
        end = try await lastUsedCluster() + 1
        if !storage.traits.isDevice, end < storage.size.dividedUp(by: clusterSize) {
            try await storage.truncate(to: end * clusterSize)
        }
    }

    private func entryOffset(_ index: Int) -> Int64 { tableOffset.bytes + Int64(index) * 8 }

    /// The last cluster of a block's range that is in use.
    private mutating func lastUsed(
        in index: Int, except ignored: Set<Int64> = []
    ) async throws -> Int64? {
        try await load(index)
        guard let block = cache[index]?.block else { return nil }
        for place in stride(from: block.count - 1, through: 0, by: -1) where block[place] != 0 {
            let found = Int64(index) * clustersPerBlock + Int64(place)
            if !ignored.contains(found) { return found }
        }
        return nil
    }

    private mutating func lastUsedCluster() async throws -> Int64 {
        for index in table.indices.reversed() where table[index] != 0 {
            if let last = try await lastUsed(in: index) { return last }
        }
        return 0
    }

    /// Behind the end of a file nothing can be in the way; a device has no end but that of the counts.
    private mutating func firstFreeAtEnd() async throws -> Int64 {
        let fileEnd =
            storage.traits.isDevice ? 0 : storage.size.dividedUp(by: clusterSize)
        for index in table.indices.reversed() where table[index] != 0 {
            if Int64(index + 1) * clustersPerBlock <= fileEnd { break }
            if let last = try await lastUsed(in: index) { return max(fileEnd, last + 1) }
        }
        return fileEnd
    }
}
