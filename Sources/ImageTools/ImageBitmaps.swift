import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// One `swimg bitmap`: changes persistent bitmaps of an image.
public struct ImageBitmaps: Sendable {
    public var image: ImageInPlace
    /// The bitmap, by its name as bytes.
    public var name: [UInt8]
    /// The changes, in this order.
    public var changes: [BitmapChange.Action]
    /// The image that holds the bitmaps to merge; nil means the image itself.
    public var mergeSource: ImageName?
    public var mergeFormat: ImageFormat?

    public init(_ image: ImageInPlace, name: [UInt8], _ changes: [BitmapChange.Action]) {
        self.image = image
        self.name = name
        self.changes = changes
    }

    /// - Throws: `ImageError` in qemu-img's words where qemu-img refuses as well. Either all
    ///   changes are made or none is.
    public func run() async throws {
        let (storage, format) = try await image.open()
        guard let editor = format.driver.bitmapEditor else {
            throw ImageError.unsupported(
                storage.name,
                "Operation \(changes.first?.word ?? "add") on bitmap \(name.text) failed: images "
                    + "in format '\(format)' have no persistent bitmaps")
        }
        var source: (any Storage)?
        if let mergeSource {
            let opener = ImageOpener(image.access)
            let opened = try await opener.openStorage(mergeSource)
            let known = try await opener.knownFormat(
                mergeFormat, of: opened, described: try ImageDescription(mergeSource))
            guard known.driver.bitmapEditor != nil else {
                throw ImageError.unsupported(
                    opened.name, "images in format '\(known)' have no persistent bitmaps")
            }
            source = opened
        }
        try await editor.change(
            storage, [BitmapChange(name: name, actions: changes, source: source)])
    }
}
