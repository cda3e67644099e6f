import DiskImage
import ImageStorage

extension Qcow2Source {
    /// Space in bytes that copies of the image's bitmaps take, fully allocated, in an image with
    /// clusters of `clusterSize` bytes; nil if the image cannot have bitmaps (version 2). A bitmap
    /// that was not saved properly is void and does not count.
    ///
    /// - Throws: `ImageError` if the bitmap directory cannot be read.
    public func bitmapsSize(clusterSize: Int64) async throws -> Int64? {
        guard header.version >= 3 else { return nil }
        guard let directory = header.bitmapDirectory else { return 0 }
        let bitmaps = try await Qcow2Bitmap.readAll(storage, directory, header.geometry)
        var sum: Int64 = 0
        var directorySize: Int64 = 0
        for bitmap in bitmaps where !bitmap.isInUse {
            let bytes = virtualSize.dividedUp(by: bitmap.granularity).dividedUp(by: 8)
            let clusters = bytes.dividedUp(by: clusterSize)
            sum += clusters * clusterSize + (clusters * 8).roundedUp(to: clusterSize)
            directorySize += Int64(bitmap.entryLength)
        }
        return sum + directorySize.roundedUp(to: clusterSize)
    }
}
