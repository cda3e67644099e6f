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
        guard let reader = source.format.driver.bitmapEditor else {
            throw ImageError.invalid("Source lacks bitmap support")
        }
        guard let editor = conversion.targetFormat.driver.bitmapEditor, target.canHaveBitmaps else {
            throw ImageError.invalid(
                "Format driver '\(conversion.targetFormat)' does not support bitmaps")
        }
        self.editor = editor
        let storage = source.topLayer.storage
        var changes: [BitmapChange] = []
        for bitmap in try await reader.bitmaps(of: storage) {
            guard !bitmap.isBroken else {
                guard conversion.skipsBrokenBitmaps else {
                    throw ImageError.invalid(
                        "Cannot copy inconsistent bitmap '\(bitmap.name.text)'\n"
                            + "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to "
                            + "delete it")
                }
                conversion.onWarning?(
                    "warning: Skipping inconsistent bitmap '\(bitmap.name.text)'")
                continue
            }
            changes.append(
                BitmapChange(
                    name: bitmap.name,
                    actions: [.add(granularity: bitmap.granularity)]
                        + (bitmap.isEnabled ? [] : [.disable]) + [.merge(bitmap.name)],
                    source: storage))
        }
        self.changes = changes
    }

    /// Adds the bitmaps to the image, which is complete otherwise.
    func write(to storage: any WritableStorage) async throws {
        if !changes.isEmpty { try await editor.change(storage, changes) }
    }
}
