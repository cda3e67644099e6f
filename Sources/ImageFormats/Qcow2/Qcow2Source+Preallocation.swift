import DiskImage
import ImageStorage

extension Qcow2Source {
    /// Finds out whether many clusters of the image have no blocks in its file.
    ///
    /// Counts clusters in use until there are clearly more of them than the file has room for. The
    /// limit is qemu's, because its `map` shows by what it finds: a ninth more, or two.
    ///
    /// - Throws: `ImageError` if the refcounts cannot be read.
    func isLikelyPreallocated() async throws -> Bool {
        guard let allocated = storage.allocatedSize else { return false }
        let clusterSize = header.geometry.clusterSize
        let room = allocated / clusterSize
        let threshold = max(room * 10 / 9, room + 2)
        let end = storage.size.roundedUp(to: guestSectorSize).dividedUp(by: clusterSize)
        let refcounts = try await RefcountReader(reading: storage, header, clusters: end)
        var count: Int64 = 0
        for index in refcounts.table.indices where count < threshold {
            guard let block = try await refcounts.block(index) else {
                throw ImageError.corrupt(storage.name, "refcount block \(index) is not aligned")
            }
            count += block.countUsed(first: Int(end) - index * refcounts.clustersPerBlock)
        }
        return count >= threshold
    }
}
