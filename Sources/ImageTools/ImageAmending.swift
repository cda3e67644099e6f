import DiskImage
import ImageDrivers
import ImageFormats

/// One `swimg amend`: changes options of an existing image.
public struct ImageAmending: Sendable {
    public var image: ImageInPlace
    public var options: CreationOptions
    /// Overwrites keys of an encrypted image, and erases the last one (`--force`).
    public var force = false

    public init(_ image: ImageInPlace, _ options: CreationOptions) {
        self.image = image
        self.options = options
    }

    /// - Throws: `ImageError` in qemu-img's words where qemu-img refuses as well, or
    ///   `CancellationError`. The image is valid in any case.
    public func run() async throws {
        let (storage, format) = try await image.open()
        let typed = try TypedOptions(amending: options, format)
        let amender = try format.amender()
        try await image.naming {
            try await amender.amend(
                storage, typed, key: image.key(), force: force,
                openBacking: { try await image.openBacking($0, in: storage) },
                openData: { try image.openData(of: $0) })
        }
    }

    /// The text that lists the options of the image's format.
    public func help() async throws -> String {
        try await image.open().format.amendHelp()
    }
}
