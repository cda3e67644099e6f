import DiskImage
import ImageStorage

/// Whether an image has many clusters that its file has no blocks for.
enum Qcow2Preallocation {
    /// Counts clusters in use until there are clearly more of them than the file has room for. The
    /// limit is qemu's, because its `map` shows by what it finds: a ninth more, or two.
    ///
    /// - Throws: `ImageError` if the refcounts cannot be read.
    static func isLikely(_ source: Qcow2Source) async throws -> Bool {
        let storage = source.storage
        guard let allocated = storage.allocatedSize else { return false }
        let clusterSize = source.header.geometry.clusterSize
        let room = allocated / clusterSize
        let threshold = max(room * 10 / 9, room + 2)
        let end = storage.size.roundedUp(to: guestSectorSize).dividedUp(by: clusterSize)
        return try await countUsed(source.header, storage, end, upTo: threshold) >= threshold
    }

    /// Goes through the refcounts, one block in memory at a time, until there are enough.
    private static func countUsed(
        _ header: Qcow2Header, _ storage: any Storage, _ endCluster: Int64, upTo threshold: Int64
    ) async throws -> Int64 {
        let clusterSize = header.geometry.clusterSize
        let codec = RefcountCodec(bits: header.refcountBits)
        let perBlock = Int64(codec.entries(inBytes: clusterSize))
        // A header can name any length, and the file can be a hole: qemu opens no longer table.
        let blocks = min(
            endCluster.dividedUp(by: perBlock),
            min(header.refcountTableClusters * clusterSize, Qcow2Layout.maximumRefcountTable) / 8)
        let reader = RefcountReader(
            storage: storage,
            table: try await storage.readWords(
                at: max(0, header.refcountTableOffset.bytes), count: blocks),
            codec: codec, clusterSize: clusterSize)
        var buffer = try IOBuffer(byteCount: Int(clusterSize))
        var count: Int64 = 0
        for index in reader.table.indices where count < threshold {
            guard try await reader.readBlock(index, into: &buffer) else { continue }
            let clusters = min(perBlock, endCluster - Int64(index) * perBlock)
            count += codec.countUsed(in: buffer.bytes, first: Int(clusters))
        }
        return count
    }
}
