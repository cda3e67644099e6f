import DiskImage
import Glibc
import ImageStorage

extension Qcow2Checker {
    private enum TableEntry {
        static let allOnes: UInt64 = 1
        static let reserved: UInt64 = 0xff00_0000_0000_01fe
    }

    /// Counts the references of bitmaps and their directory.
    ///
    /// - Throws: `ImageError` if the directory cannot be understood, because its clusters would
    ///   look leaked.
    func countBitmaps() async throws {
        guard let directory = header.bitmapDirectory else { return }
        try directory.check(storage.name, clusterSize)
        try count { $0.addRegion(offset: directory.offset, size: directory.size) }
        let bitmaps: [Qcow2Bitmap]
        do {
            bitmaps = try await Qcow2Bitmap.readAll(storage, directory, header.geometry)
        } catch let error as ImageError where error.kind == .corrupt || error.kind == .unsupported {
            throw ImageError.checkFailed(EINVAL)
        }
        for bitmap in bitmaps { try await count(bitmap) }
    }

    private func count(_ bitmap: Qcow2Bitmap) async throws {
        try count {
            $0.addRegion(offset: bitmap.tableOffset, size: UInt64(bitmap.tableEntries) * 8)
        }
        guard let offset = Int64(exactly: bitmap.tableOffset), offset < storage.size else { return }
        let table = try await storage.readWords(at: offset, count: Int64(bitmap.tableEntries))
        var invalid: Int64 = 0
        try count { collector in
            for entry in table {
                let offset = entry & Qcow2Entry.offsetMask
                guard entry & TableEntry.reserved == 0,
                    offset == 0
                        || entry & TableEntry.allOnes == 0 && offset % UInt64(clusterSize) == 0
                else {
                    invalid += 1
                    continue
                }
                if offset != 0 {
                    collector.addRegion(offset: offset, size: UInt64(clusterSize))
                }
            }
        }
        damage.corruptions += invalid
    }
}
