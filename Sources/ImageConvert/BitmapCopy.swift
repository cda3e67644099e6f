import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// The persistent bitmaps that a conversion copies (`--bitmaps`).
struct BitmapCopy {
    private let editor: any BitmapEditor
    private let changes: [BitmapChange]

    /// - Parameter target: the image to write.
    /// - Throws: `ImageError` in qemu-img's words if source or target cannot have bitmaps, or if
    ///   one of them was not saved properly.
    init(
        _ conversion: Conversion, from source: OpenedImage, to target: any WrittenImage
    ) async throws {
        let storage = source.topLayer.storage
        guard let bitmaps = try await source.format.driver.bitmapEditor?.bitmaps(of: storage)
        else { throw ImageError.invalid("Source lacks bitmap support") }
        guard let editor = conversion.targetFormat.driver.bitmapEditor, target.canHaveBitmaps else {
            throw ImageError.invalid(
                "Format driver '\(conversion.targetFormat)' does not support bitmaps")
        }
        self.editor = editor
        // qemu-img goes through them from the last to the first.
        for bitmap in bitmaps.reversed() where bitmap.isBroken {
            guard conversion.skipsBrokenBitmaps else { throw Self.brokenError(bitmap) }
            conversion.onWarning?("warning: Skipping inconsistent bitmap '\(bitmap.name.text)'")
        }
        changes = bitmaps.filter { !$0.isBroken }.map { bitmap in
            var change = BitmapChange(
                name: bitmap.name,
                actions: [.add(granularity: bitmap.granularity)]
                    + (bitmap.isEnabled ? [] : [.disable]) + [.merge(bitmap.name)],
                source: storage)
            change.sourceMayDifferInSize = true
            return change
        }
    }

    /// Adds the bitmaps to the image, which is complete otherwise.
    func write(to storage: any WritableStorage) async throws {
        if !changes.isEmpty { try await editor.change(storage, changes) }
    }

    private static func brokenError(_ bitmap: ImageBitmap) -> ImageError {
        let words = "Cannot copy inconsistent bitmap '\(bitmap.name.text)'"
        let remedy = "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
        return ImageError.invalid("\(words): \(remedy)").asQemu(words, hint: remedy)
    }
}
