import DiskImage
import ImageStorage

/// The options (`-o`) that all formats share.
public struct ImageParameters: Sendable {
    /// The size of the guest disk in bytes; nil takes it from the source or the backing file.
    public var size: Int64?
    public var backingFile: ImageName?
    public var backingFormat: String?
    /// The file that is to hold the data of the disk; nil for the image's own file.
    public var dataFile: HostPath?
    public var isDataFileRaw = false
    public var preallocation = Preallocation.off
    public var attributes = FileAttributes()
    public var isEncrypted = false

    public init() {}

    /// - Parameter preallocation: reads the mode; formats differ in the modes that they know.
    /// - Throws: `ImageError` in qemu-img's words.
    init(
        _ options: TypedOptions,
        preallocation: (String) throws(ImageError) -> Preallocation
    ) throws(ImageError) {
        size = try options.number("size").map { size throws(ImageError) in
            try size.checkedAsDiskSize()
        }
        backingFile = options.name("backing_file")
        backingFormat = options.text("backing_fmt")
        dataFile = try options.name("data_file")?.path()
        isDataFileRaw = options.isOn("data_file_raw") ?? false
        if let mode = options.text("preallocation") {
            self.preallocation = try preallocation(mode)
        }
        attributes.noCopyOnWrite = options.isOn("nocow") ?? false
        attributes.extentSizeHint = options.number("extent_size_hint")
        if let hint = attributes.extentSizeHint, hint > UInt32.max {
            throw .invalid("Extent size hint is too large")
        }
    }
}

extension Preallocation {
    /// - Throws: `ImageError` for an unknown mode, in the words of qemu-img where it reads the
    ///   option itself.
    init(option: String) throws(ImageError) {
        guard let mode = Self(rawValue: option) else {
            throw .invalid("invalid parameter value: \(option)")
        }
        self = mode
    }
}
