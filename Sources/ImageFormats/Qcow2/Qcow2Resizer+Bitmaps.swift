import DiskImage
import ImageStorage

extension Qcow2Resizer {
    /// Resizes the disk and its bitmaps, which are void from before until after the change.
    ///
    /// - Throws: as `resize`, and also if a bitmap was not saved properly.
    mutating func resizeWithBitmaps(to size: Int64, preallocation: Preallocation) async throws {
        var bitmaps = try await Qcow2BitmapList(reading: image)
        if let broken = bitmaps.bitmaps.first(where: \.isInUse) {
            throw broken.inconsistent
        }
        try await bitmaps.begin(image) { _ in true }
        do {
            try await resize(to: size, preallocation: preallocation)
        } catch {
            if !image.isSwitched { try? await bitmaps.undo(image) }
            throw error
        }
        guard !bitmaps.bitmaps.isEmpty else { return }
        let header = try await Qcow2Header.read(from: storage)
        var (resized, refcounts) = try await Qcow2WritableImage.sound(storage, header)
        try bitmaps.resize(to: header.geometry.virtualSize)
        try await bitmaps.store(in: &resized, &refcounts)
    }
}
