import DiskImage
import ImageStorage

/// The creator of a format's new images.
public protocol ImageCreator: Sendable {
    /// The keys of `-o`, in the order in which `qemu-img create` prints them.
    var options: [OptionDescription] { get }
    /// Whether images can hold compressed clusters.
    var canCompress: Bool { get }

    /// Reads the options.
    ///
    /// - Throws: `ImageError` in qemu-img's words, or for an option that is not supported yet.
    func newImage(_ options: TypedOptions) throws(ImageError) -> any NewImage

    /// Prepares to write into an existing image where it stands.
    ///
    /// - Parameters:
    ///   - image: as it is now.
    ///   - leavesBacking: whether the content leaves out what the image, or its backing file, holds
    ///     already.
    func existingImage(
        _ image: any Image, leavesBacking: Bool
    ) throws(ImageError) -> any WrittenImage

    /// Calculates the size that an image of a disk would have.
    func measure(
        _ disk: MeasuredDisk, _ options: TypedOptions
    ) async throws -> MeasuredSize
}

extension ImageCreator {
    public func existingImage(
        _ image: any Image, leavesBacking: Bool
    ) throws(ImageError) -> any WrittenImage {
        throw .unsupported(image.storage.name, "cannot be written into (-n)")
    }
}

/// An image that a conversion writes: a new one, or one that is there.
public protocol WrittenImage: Sendable {
    /// Whether the image can have persistent bitmaps.
    var canHaveBitmaps: Bool { get }

    /// Gives the image the storage of its data file, if it has one.
    mutating func setData(_ storage: any WritableStorage)

    /// Begins to write the image.
    ///
    /// - Parameter size: the size of the guest disk in bytes.
    func makeTarget(
        on storage: any WritableStorage, size: Int64, _ settings: TargetSettings
    ) async throws -> any ImageTarget
}

/// A new image before it is written.
public protocol NewImage: WrittenImage {
    var parameters: ImageParameters { get }

    /// Gives the image a backing file.
    ///
    /// - Parameter virtualSize: the size of the backing disk in bytes.
    mutating func setBacking(_ backing: BackingName, virtualSize: Int64)

    /// Checks that a conversion can write the image with its options and a backing file.
    func checkBackedConversion() throws(ImageError)

    /// Checks that the options are compatible.
    func check() throws(ImageError)

    /// Writes an image without data: it reads as zeros, or as its backing file.
    func makeEmpty(on storage: any WritableStorage, size: Int64) async throws
}

extension WrittenImage {
    public var canHaveBitmaps: Bool { false }

    public mutating func setData(_ storage: any WritableStorage) {}
}

extension NewImage {
    public mutating func setBacking(_ backing: BackingName, virtualSize: Int64) {}

    public func checkBackedConversion() {}

    public func check() {}
}

/// Settings of a conversion for its target, for every format.
public struct TargetSettings: Sendable {
    public var compress = false
    /// The length in bytes from which a run of zeros is left out; 0 stores everything.
    public var minSparse: Int64
    /// Whether to look for zeros even in data that the file system could share unread.
    public var looksForZeros = false
    /// Whether the storage existed before, and keeps its size.
    public var isThere = false
    /// Whether the storage reads as zeros where nothing is written.
    public var readsAsZero = false
    /// Whether the existing image is to get another backing file, so that zeros have to be recorded
    /// even if it has none yet.
    public var getsBacking = false

    public init(minSparse: Int64) { self.minSparse = minSparse }
}

/// The disk that `measure` calculates an image's size for.
public struct MeasuredDisk: Sendable {
    /// The size in bytes, a multiple of `guestSectorSize`.
    public var size: Int64
    /// Whether the disk is that of an image, not an empty one.
    public var isImage = false
    /// Counts the bytes of the disk's data, in whole clusters of the given size.
    public var allocatedData: @Sendable (_ clusterSize: Int64) async throws -> Int64
    /// See `Image.bitmapsSize`.
    public var bitmapsSize: @Sendable (_ clusterSize: Int64) async throws -> Int64?

    /// An empty disk.
    public init(emptyOfSize size: Int64) {
        self.size = size
        allocatedData = { _ in 0 }
        bitmapsSize = { _ in nil }
    }

    /// The disk of an image.
    public init(
        size: Int64,
        allocatedData: @escaping @Sendable (_ clusterSize: Int64) async throws -> Int64,
        bitmapsSize: @escaping @Sendable (_ clusterSize: Int64) async throws -> Int64?
    ) {
        self.size = size
        isImage = true
        self.allocatedData = allocatedData
        self.bitmapsSize = bitmapsSize
    }
}

/// The sizes that `measure` shows, in bytes.
public struct MeasuredSize: Sendable, Equatable {
    /// The size of the file with the disk's data.
    public var required: Int64
    /// The size of the file with all clusters allocated.
    public var fullyAllocated: Int64
    /// The size of the source's bitmaps; nil if source or target cannot have any.
    public var bitmaps: Int64?
}
