import DiskImage
import ImageStorage

/// The driver of expanding Parallels images, which can only be read.
public struct ParallelsDriver: FormatDriver {
    public let name = "parallels"

    public init() {}

    public func recognizes(_ start: RawSpan) -> Bool { ParallelsHeader.Kind(start) != nil }

    public func open(_ storage: any Storage) async throws -> any Image {
        try await ParallelsImage(storage)
    }
}

extension ImageFormat {
    public static let parallels = ImageFormat(ParallelsDriver())
}
