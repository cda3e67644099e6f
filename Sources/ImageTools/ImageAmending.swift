import DiskImage
import ImageDrivers
import ImageFormats

/// One `swimg amend`: changes options of an existing image.
public struct ImageAmending: Sendable {
    public var image: ImageInPlace
    public var options: CreationOptions

    public init(_ image: ImageInPlace, _ options: CreationOptions) {
        self.image = image
        self.options = options
    }

    /// - Throws: `ImageError` in qemu-img's words where qemu-img refuses as well, or
    ///   `CancellationError`. The image is valid in any case.
    public func run() async throws {
        let (storage, format) = try await image.open()
        let typed = try TypedOptions(amending: options, format)
        try await format.amender().amend(
            storage, typed,
            openBacking: { backing in
                try await ImageOpener(image.access).openBacking(
                    backing, of: try image.place(), in: storage)
            },
            openData: { try image.openData(of: $0) })
    }

    /// The text that lists the options of the image's format.
    public func help() async throws -> String {
        try await image.open().format.amendHelp()
    }
}
