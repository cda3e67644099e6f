import DiskImage
import ImageStorage

/// The driver of raw images, last in the list of formats: a storage that no other format recognizes
/// holds the guest's own bytes.
public struct RawDriver: FormatDriver {
    public let name = "raw"
    public let isPlain = true
    public var creator: (any ImageCreator)? { RawCreator() }
    public var resizer: (any ImageResizer)? { RawResizer() }

    public init() {}

    public func recognizes(_ start: RawSpan) -> Bool { true }

    /// Reads `offset` and `size`, which make a part of a file a disk of its own (inside an archive,
    /// for example).
    public func readOptions(
        from options: inout DescribedOptions, prefix: String, into described: inout DescribedFormat
    ) throws(ImageError) {
        let offset = try options.size(prefix + "offset")
        let size = try options.size(prefix + "size")
        guard offset != nil || size != nil else { return }
        if let size, size % guestSectorSize != 0 {
            throw options.invalid("'\(prefix)size' is not a multiple of \(guestSectorSize)")
        }
        described.parts.insert(.init(offset: offset ?? 0, size: size), at: 0)
    }

    public func open(_ storage: any Storage) -> any Image { RawSource(storage) }

    public func facts(of storage: any Storage) -> FormatFacts {
        // As in qemu, a file counts as closed properly, and a server's file as unknown.
        FormatFacts(
            virtualSize: RawSource(storage).guestSize,
            isDirty: storage.traits.isRemote ? nil : false)
    }
}

extension ImageFormat {
    public static let raw = ImageFormat(RawDriver())
}
