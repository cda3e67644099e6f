import DiskImage
import Glibc
import ImageStorage

/// The reference counts of an image that is changed in place.
///
/// Counts are raised (`allocate`, `settle`) before anything leads to the clusters, and lowered
/// after nothing does any more. Whenever the process ends, a count is too high at worst: a leak.
///
/// `allocate` finds clusters behind everything else, and `settle` makes a new table for new blocks:
/// until the header names that, the image is the old one, and `rollBack` can make the file as long
/// as it was. An image that is written for long uses `take`, which finds free clusters anywhere,
/// and `publish`, which changes the table in place. After `deferChanges` no count in the file
/// changes before the header leads to the new table.
struct Qcow2Refcounts {
    /// The place of a refcount table, as the header names it.
    struct Table: Sendable, Equatable {
        var offset: HostOffset
        var clusters: Int64
    }

    let storage: any WritableStorage
    let clusterSize: Int64
    let clustersPerBlock: Int64
    private(set) var place: Table
    var cache: RefcountCache
    /// The cached blocks that differ from those in the file.
    private var changed: Set<Int> = []
    /// Index of the first cluster behind everything, where new ones are allocated.
    var end: Int64
    /// Index of the cluster from which on `take` looks for free ones.
    private var searchStart: Int64 = 0
    /// Clusters that are taken and not counted yet, because their block needs a place first.
    private var uncounted: Range<Int64> = 0..<0
    /// Blocks that the table in the file does not name yet.
    private var newBlocks: Set<Int> = []
    /// Whether blocks are written to new places before they change.
    private var isDeferring = false
    /// Blocks that have got a new place.
    private var moved: Set<Int> = []
    /// Clusters whose last reference goes with the switch of the header.
    private var freedBySwitch: [Int64] = []
    /// Whether a count has fallen to one, so that entries need their copied flag.
    private(set) var hasNewSingles = false

    /// The state before the first allocation.
    private struct Origin {
        var table: [UInt64]
        var end: Int64
        /// Length of the file in bytes.
        var fileSize: Int64
    }
    private let origin: Origin

    /// - Throws: `ImageError` if the file ends within the table or a block.
    init(_ image: SoundImage, storage: any WritableStorage) throws {
        self.storage = storage
        let table = image.refcounts.table
        place = Table(
            offset: image.header.refcountTableOffset, clusters: image.header.refcountTableClusters)
        clusterSize = image.refcounts.clusterSize
        clustersPerBlock = Int64(image.refcounts.clustersPerBlock)
        // A check takes the missing part of a file's last cluster for zeros, but it cannot be
        // changed.
        guard place.offset.bytes <= storage.size - place.clusters * clusterSize,
            Int64(table.max() ?? 0) <= storage.size - clusterSize
        else {
            throw ImageError.corrupt(
                storage.name,
                "the refcounts reach beyond the end of the file (\(storage.size) bytes): "
                    + "try to repair the image (check -r)")
        }
        cache = RefcountCache(image.refcounts)
        end = image.firstFree
        origin = Origin(table: table, end: end, fileSize: storage.size)
    }

    // MARK: Counts

    var table: [UInt64] { cache.reader.table }

    mutating func count(of cluster: Int64) async throws -> UInt64 {
        try await load(Int(cluster / clustersPerBlock))
        return try await cache.refcount(of: Int(cluster)) ?? 0
    }

    func hasBlock(for cluster: Int64) -> Bool {
        cache.reader.blockOffset(Int(cluster / clustersPerBlock)) != 0
    }

    /// The count of a cluster whose block is in the cache. Where there are many clusters, ask here
    /// first: an asynchronous call for each would take longer than all else.
    func cachedCount(of cluster: Int64) -> UInt64? {
        let (index, place) = cluster.quotientAndRemainder(dividingBy: clustersPerBlock)
        return cache.blocks[Int(index)]??[Int(place)]
    }

    /// Adds one reference to each cluster.
    ///
    /// - Returns: false if a count is at its maximum already.
    mutating func raise(_ clusters: [Int64]) async throws -> Bool {
        for cluster in clusters {
            let count =
                if let cached = cachedCount(of: cluster) { cached } else {
                    try await count(of: cluster)
                }
            guard count > 0 else {
                throw ImageError.corrupt(
                    storage.name, "cluster \(cluster) is in use, and its refcount is 0")
            }
            guard count < RefcountBlock.maximum(bits: cache.reader.bits) else { return false }
            if !mayChange(cluster) { try await change(Int(cluster / clustersPerBlock)) }
            set(cluster, to: count + 1)
        }
        return true
    }

    /// Takes one reference from each cluster and gives back the blocks of those that become free.
    mutating func release(_ clusters: [Int64]) async throws {
        var run: Range<Int64>?
        for cluster in clusters {
            let count =
                if let cached = cachedCount(of: cluster) { cached } else {
                    try await count(of: cluster)
                }
            guard count > 0, cluster > 0 else {
                throw ImageError.corrupt(
                    storage.name,
                    "cluster \(cluster) cannot be freed: its refcount is \(count): try to repair "
                        + "the image (check -r)")
            }
            if isDeferring, count == 1 {
                // The file's tables still lead to it.
                freedBySwitch.append(cluster)
                continue
            }
            if !mayChange(cluster) { try await change(Int(cluster / clustersPerBlock)) }
            set(cluster, to: count - 1)
            if count == 2 { hasNewSingles = true }
            guard count == 1 else { continue }
            searchStart = min(searchStart, cluster)
            if let open = run, open.upperBound == cluster {
                run = open.lowerBound..<cluster + 1
            } else {
                await discard(run)
                run = cluster..<cluster + 1
            }
        }
        await discard(run)
    }

    /// Whether the block that counts a cluster is prepared for a change.
    private func mayChange(_ cluster: Int64) -> Bool {
        let index = Int(cluster / clustersPerBlock)
        return changed.contains(index) && (!isDeferring || moved.contains(index))
    }

    /// Sets a count in a block that is prepared for it.
    private mutating func set(_ cluster: Int64, to count: UInt64) {
        let (index, place) = cluster.quotientAndRemainder(dividingBy: clustersPerBlock)
        cache.blocks[Int(index)]??[Int(place)] = count
    }

    /// Prepares a block for a change.
    private mutating func change(_ index: Int) async throws {
        if isDeferring, moved.insert(index).inserted {
            let place = try await take(upTo: 1).lowerBound
            try await load(index)
            freedBySwitch.append(Int64(table[index]) / clusterSize)
            cache.reader.table[index] = UInt64(place * clusterSize)
            newBlocks.insert(index)
        }
        try await load(index)
        changed.insert(index)
    }

    mutating func load(_ index: Int) async throws {
        if cache.isFull, cache.blocks[index] == nil { try await writeChanged() }
        try await cache.load(index)
    }

    private mutating func writeChanged() async throws {
        for index in changed.sorted() {
            guard let block = cache.blocks[index] ?? nil else { continue }
            try await storage.writeBytes(block.bytes, at: Int64(table[index]))
        }
        changed = []
    }

    /// Writes the changed blocks. On return they are on stable storage, with everything written
    /// before.
    mutating func flush() async throws {
        try await writeChanged()
        try await storage.flush()
    }

    // MARK: Allocation

    /// Allocates contiguous clusters behind the end of the image, each with a count of 1.
    ///
    /// - Returns: index of the first one.
    mutating func allocate(_ count: Int64) async throws -> Int64 {
        let blocks = missingBlocks(for: count)
        let start = end
        let first = start + Int64(blocks.count)
        let newEnd = first + count
        let lastBlock = Int((newEnd - 1) / clustersPerBlock)
        guard newEnd <= largestDiskSize / clusterSize,
            Int64(lastBlock) < Qcow2Layout.maximumRefcountTable / 8
        else {
            throw ImageError(
                .invalid, path: storage.name,
                "the image grows too large for clusters of \(clusterSize) bytes")
        }
        if storage.traits.isDevice, newEnd > storage.size / clusterSize {
            throw ImageError(
                .system(errno: ENOSPC), path: storage.name,
                "the device is too small: \(String(cString: strerror(ENOSPC)))")
        }
        if lastBlock >= table.count {
            try MemoryMargin.check(for: (lastBlock + 1 - table.count) * 8)
        }
        // Set first: a failure from here on is rolled back to the old end.
        end = newEnd
        let outer = uncounted
        uncounted = (outer.isEmpty ? start : outer.lowerBound)..<newEnd
        defer { uncounted = outer }
        // The file has its new length from now on, and reads as zeros where nothing is written.
        if !storage.traits.isDevice { try await storage.truncate(to: newEnd * clusterSize) }
        cache.reader.table.appendZeros(upTo: lastBlock + 1)
        for (place, index) in blocks.enumerated() {
            try await load(index)
            newBlocks.insert(index)
            moved.insert(index)
            cache.reader.table[index] = UInt64((start + Int64(place)) * clusterSize)
            cache.blocks[index] = RefcountBlock(
                bits: cache.reader.bits, byteCount: Int(clusterSize))
            changed.insert(index)
        }
        try await setCounts(start..<newEnd, to: 1)
        return first
    }

    /// Takes clusters in a row, each with a count of 1 afterwards: free ones, or new ones behind
    /// the end.
    ///
    /// - Parameter count: largest number of clusters.
    mutating func take(upTo count: Int64) async throws -> Range<Int64> {
        while searchStart < end {
            if uncounted.contains(searchStart) {
                searchStart = uncounted.upperBound
                continue
            }
            let (index, place) = searchStart.quotientAndRemainder(dividingBy: clustersPerBlock)
            var stop = min(end, (index + 1) * clustersPerBlock)
            if searchStart < uncounted.lowerBound { stop = min(stop, uncounted.lowerBound) }
            // Without a block, clusters would need a new one: those behind the end come first.
            if hasBlock(for: searchStart) {
                try await load(Int(index))
                let last = Int(stop - index * clustersPerBlock)
                if let free = cache.blocks[Int(index)]??.firstFree(
                    in: Int(place)..<last, upTo: Int(clamping: count))
                {
                    let start = index * clustersPerBlock
                    let found = start + Int64(free.lowerBound)..<start + Int64(free.upperBound)
                    // Set first: the block may need a new place.
                    searchStart = found.upperBound
                    try await setCounts(found, to: 1)
                    return found
                }
            }
            searchStart = stop
        }
        searchStart = end
        let first = try await allocate(count)
        return first..<first + count
    }

    /// Takes clusters that follow each other, each with a count of 1 afterwards.
    ///
    /// - Returns: index of the first one.
    mutating func takeInARow(_ count: Int64) async throws -> Int64 {
        count == 1 ? try await take(upTo: 1).lowerBound : try await allocate(count)
    }

    /// Sets counts without reading them: the clusters were free, so old counts mean nothing.
    private mutating func setCounts(_ clusters: Range<Int64>, to count: UInt64) async throws {
        var next = clusters.lowerBound
        while next < clusters.upperBound {
            let index = next / clustersPerBlock
            let stop = min(clusters.upperBound, (index + 1) * clustersPerBlock)
            if hasBlock(for: next) {
                try await change(Int(index))
                // The block leaves the cache meanwhile, or each change would copy it.
                if var block = cache.blocks.removeValue(forKey: Int(index)) ?? nil {
                    for cluster in next..<stop {
                        let place = Int(cluster % clustersPerBlock)
                        block[place] = count
                    }
                    cache.blocks[Int(index)] = block
                }
            }
            next = stop
        }
    }

    // MARK: Changes by one switch

    /// From now on, blocks that change are written to new places, and clusters that lose their last
    /// reference stay counted. `settle` writes the new table, and `finishSwitch` ends this.
    mutating func deferChanges() { isDeferring = true }

    /// Frees what the header's switch to the new table has made free.
    mutating func finishSwitch(from old: Table) async throws {
        isDeferring = false
        moved = []
        if old != place {
            let first = old.offset.bytes / clusterSize
            freedBySwitch += first..<first + old.clusters
        }
        try await release(freedBySwitch.sorted())
        freedBySwitch = []
        try await flush()
    }

    /// Writes all counts. New blocks get a new table, to which the header has to lead next.
    mutating func settle() async throws {
        if !newBlocks.isEmpty { try await placeTable() }
        try await writeChanged()
    }

    private mutating func placeTable() async throws {
        var clusters = place.clusters
        // The table's own clusters can need another block, and that another entry.
        while true {
            let entries = max(table.count, (missingBlocks(for: clusters).last ?? 0) + 1)
            let needed = (Int64(entries) * 8).dividedUp(by: clusterSize)
            guard needed > clusters else { break }
            // Some spare entries, so that the table need not grow again soon.
            clusters = max(
                needed,
                min(needed + needed / 2, Qcow2Layout.maximumRefcountTable / clusterSize))
        }
        let first = try await allocate(clusters)
        cache.reader.table.appendZeros(upTo: Int(clusters * clusterSize / 8))
        place = Table(offset: HostOffset(first * clusterSize), clusters: clusters)
        try await storage.writeWords(table, at: place.offset.bytes)
        newBlocks = []
    }

    /// Brings all counts to stable storage, with everything written before, so that tables may lead
    /// to the clusters that were taken. The table names new blocks in its own entries, if it has
    /// room for them.
    mutating func publish(in image: inout Qcow2WritableImage) async throws {
        try await flush()
        guard !newBlocks.isEmpty else { return }
        if Int64(table.count) * 8 <= place.clusters * clusterSize {
            for index in newBlocks.sorted() {
                try await storage.writeWords([table[index]], at: entryOffset(index))
            }
            newBlocks = []
            return try await storage.flush()
        }
        let old = place
        try await placeTable()
        try await writeChanged()
        try await image.changeHeader { [place] in
            $0.refcountTableOffset = place.offset
            $0.refcountTableClusters = place.clusters
        }
        let first = old.offset.bytes / clusterSize
        try await release(Array(first..<first + old.clusters))
    }

    /// Restores the counts and the file from before the first allocation. Nothing may lead to the
    /// allocated clusters.
    mutating func rollBack() async throws {
        isDeferring = false
        newBlocks = []
        cache.blocks = [:]
        changed = []
        cache.reader.table = origin.table
        let allocated = origin.end..<end
        end = origin.end
        try await setCounts(allocated, to: 0)
        try await writeChanged()
        guard !storage.traits.isDevice, storage.size != origin.fileSize else { return }
        try await storage.truncate(to: origin.fileSize)
    }

    func entryOffset(_ index: Int) -> Int64 { place.offset.bytes + Int64(index) * 8 }
}
