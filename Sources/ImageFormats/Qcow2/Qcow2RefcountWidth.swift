import DiskImage
import ImageStorage

/// Gives an image refcounts of another width: writes new blocks and a new table behind everything,
/// makes the header lead to them, and frees the old ones.
struct Qcow2RefcountWidth {
    private let storage: any WritableStorage
    private let sound: SoundImage

    /// Reads all metadata.
    ///
    /// - Throws: `ImageError` for images that have errors.
    init(_ storage: any WritableStorage) async throws {
        self.storage = storage
        sound = try await SoundImage(storage)
    }

    /// The places of the new structures, as indices of clusters.
    private struct Layout {
        /// Indices of the new blocks in the table, in order; their clusters are in a row.
        var blocks: [Int64]
        var first: Int64
        var tableClusters: Int64

        var table: Int64 { first + Int64(blocks.count) }
        var end: Int64 { table + tableClusters }
    }

    private var clusterSize: Int64 { sound.refcounts.clusterSize }

    /// - Parameter bits: a power of two up to 64.
    /// - Throws: `ImageError`. Before the header is written, the old file stays; a failure after it
    ///   leaves the new image, with leaks at worst.
    func change(to bits: Int) async throws {
        let layout = try await layout(bits)
        let oldSize = storage.size
        var image = try await Qcow2WritableImage.damaged(storage)
        do {
            try await write(layout, bits)
            try await image.rewriteHeader {
                $0.refcountBits = bits
                $0.refcountTableOffset = HostOffset(layout.table * clusterSize)
                $0.refcountTableClusters = layout.tableClusters
            }
        } catch {
            if !image.isSwitched { try? await storage.truncate(to: oldSize) }
            throw error
        }
        var (_, refcounts) = try await Qcow2WritableImage.sound(
            storage, image.header)
        try await refcounts.release(oldClusters.sorted())
        try await refcounts.flush()
    }

    /// The clusters of the old table and its blocks.
    private var oldClusters: [Int64] {
        let table = sound.header.refcountTableOffset.bytes / clusterSize
        let blocks = sound.refcounts.table.filter { $0 != 0 }
        return Array(table..<table + sound.header.refcountTableClusters)
            + blocks.map { Int64($0 & RefcountReader.offsetMask) / clusterSize }
    }

    // MARK: The layout

    private func layout(_ bits: Int) async throws -> Layout {
        let perBlock: Int64 = RefcountBlock.count(bits: bits, byteCount: clusterSize)
        let used = try await usedBlocks(perBlock, maximum: RefcountBlock.maximum(bits: bits))
        var layout = Layout(blocks: used, first: sound.firstFree, tableClusters: 0)
        // The new structures are counted, too, which can need further blocks.
        while true {
            let own = layout.first / perBlock...(layout.end - 1) / perBlock
            let blocks = used.filter { $0 < own.lowerBound } + Array(own)
            let entries = (blocks.last ?? 0) + 1
            let tableClusters = (entries * 8).dividedUp(by: clusterSize)
            if blocks == layout.blocks, tableClusters == layout.tableClusters { break }
            layout.blocks = blocks
            layout.tableClusters = tableClusters
        }
        guard layout.tableClusters * clusterSize <= Qcow2Layout.maximumRefcountTable,
            layout.end <= largestDiskSize / clusterSize
        else {
            throw ImageError(
                .invalid, path: storage.name,
                "the image is too large for refcounts of \(bits) bits")
        }
        return layout
    }

    /// Indices of the new blocks for clusters that are counted now, in order.
    ///
    /// - Throws: `ImageError` in qemu-img's words if a count is too large.
    private func usedBlocks(_ perBlock: Int64, maximum: UInt64) async throws -> [Int64] {
        var used: [Int64] = []
        try await forEachCount(in: 0..<sound.firstFree) { cluster, count in
            guard count <= maximum else {
                let bits = 64 - maximum.leadingZeroBitCount
                throw ImageError.invalid(
                    "Cannot decrease refcount entry width to \(bits) bits: Cluster at offset "
                        + "0x\(String(cluster * clusterSize, radix: 16)) has a refcount of "
                        + "\(count)")
            }
            if used.last != cluster / perBlock { used.append(cluster / perBlock) }
        }
        return used
    }

    /// Calls `body` with each cluster that is counted, and its count.
    private func forEachCount(
        in clusters: Range<Int64>, _ body: (_ cluster: Int64, _ count: UInt64) throws -> Void
    ) async throws {
        let perBlock = Int64(sound.refcounts.clustersPerBlock)
        var next = clusters.lowerBound
        while next < clusters.upperBound {
            let index = next / perBlock
            let stop = min(clusters.upperBound, (index + 1) * perBlock)
            if sound.refcounts.blockOffset(Int(index)) != 0,
                let block = try await sound.refcounts.block(Int(index))
            {
                for cluster in next..<stop {
                    let count = block[Int(cluster - index * perBlock)]
                    if count > 0 { try body(cluster, count) }
                }
            }
            next = stop
        }
    }

    // MARK: Writing

    private func write(_ layout: Layout, _ bits: Int) async throws {
        try await storage.truncate(to: layout.end * clusterSize)
        let perBlock: Int64 = RefcountBlock.count(bits: bits, byteCount: clusterSize)
        try MemoryMargin.check(for: Int(layout.tableClusters * clusterSize))
        var table = [UInt64](repeating: 0, count: Int(layout.tableClusters * clusterSize / 8))
        for (place, index) in layout.blocks.enumerated() {
            try Task.checkCancellation()
            let first = index * perBlock
            var block = RefcountBlock(bits: bits, byteCount: Int(clusterSize))
            let old = first..<max(first, min(first + perBlock, layout.first))
            try await forEachCount(in: old) { cluster, count in
                block[Int(cluster - first)] = count
            }
            let new = (layout.first..<layout.end).clamped(to: first..<first + perBlock)
            for cluster in new { block[Int(cluster - first)] = 1 }
            let cluster = layout.first + Int64(place)
            try await storage.writeBytes(block.bytes, at: cluster * clusterSize)
            table[Int(index)] = UInt64(cluster * clusterSize)
        }
        try await storage.writeWords(table, at: layout.table * clusterSize)
    }
}
