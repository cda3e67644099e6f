import DiskImage
import ImageStorage

// Blocks for a longer file, and giving back what is free.
extension Qcow2Refcounts {
    /// Frees blocks that count nothing any more, and cuts a file behind its last cluster.
    mutating func releaseEnd() async throws {
        try await flush()
        // From the end on, because a block mostly lies in the range of the one before it.
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
            try await storage.writeBytes([UInt8](repeating: 0, count: 8), at: entryOffset(index))
            cache.reader.table[index] = 0
            cache.blocks[index] = nil
        }
        try await storage.flush()
        try await release(dropped.filter(hasBlock).sorted())
        try await flush()
        guard let last = try await lastUsedCluster() else { return }
        end = last + 1
        if !storage.traits.isDevice, end < storage.size.dividedUp(by: clusterSize) {
            try await storage.truncate(to: end * clusterSize)
        }
    }

    /// The last used cluster of a block's range. Counts of clusters behind the end of the storage
    /// do not matter: a program may have died before it wrote there.
    private mutating func lastUsed(
        in index: Int, except ignored: Set<Int64> = []
    ) async throws -> Int64? {
        let first = Int64(index) * clustersPerBlock
        let stop = min(clustersPerBlock, storage.size.dividedUp(by: clusterSize) - first)
        guard stop > 0 else { return nil }
        try await load(index)
        guard let block = cache.blocks[index] ?? nil else { return nil }
        for place in stride(from: Int(stop) - 1, through: 0, by: -1) where block[place] != 0 {
            let found = first + Int64(place)
            if !ignored.contains(found) { return found }
        }
        return nil
    }

    /// nil if nothing is counted, not even the header.
    private mutating func lastUsedCluster() async throws -> Int64? {
        for index in table.indices.reversed() where table[index] != 0 {
            if let last = try await lastUsed(in: index) { return last }
        }
        return nil
    }

    /// Gives back the blocks of clusters. Blocks that cannot be given back stay, which does no
    /// harm.
    func discard(_ clusters: Range<Int64>?) async {
        guard let clusters, !storage.traits.isDevice else { return }
        let end = min(clusters.upperBound * clusterSize, storage.size)
        let start = clusters.lowerBound * clusterSize
        guard start < end else { return }
        try? await storage.zero(start..<end, mayUnmap: true)
    }

    /// The blocks that have to be made to count so many more clusters, and themselves. Unlike
    /// `RefcountMetadataSize`, this depends on the blocks that exist: any may be missing.
    func missingBlocks(for count: Int64) -> [Int] {
        var missing: [Int] = []
        while true {
            let newEnd = end + Int64(missing.count) + count
            let blocks = Int(end / clustersPerBlock)..<Int(newEnd.dividedUp(by: clustersPerBlock))
            let found = blocks.filter { $0 >= table.count || table[$0] == 0 }
            if found.count == missing.count { return found }
            missing = found
        }
    }
}
