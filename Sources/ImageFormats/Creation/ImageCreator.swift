import DiskImage
import ImageStorage

/// Makes images of a format.
public protocol ImageCreator: Sendable {
    /// The keys of `-o`, in the order in which qemu-img prints them when it creates an image.
    var options: [OptionDescription] { get }
    /// Images can hold compressed clusters.
    var canCompress: Bool { get }

    /// Reads the options.
    ///
    /// - Throws: `ImageError` in qemu-img's words, or for what cannot be written yet.
    func newImage(_ options: TypedOptions) throws(ImageError) -> any NewImage

    /// A new image with the properties of one that is there, which is to be written into (`-n`).
    ///
    /// Plain images are written as they stand and never rebuilt.
    ///
    /// - Throws: `ImageError` if the new image would lose something.
    func newImage(like image: any Image, backingSize: Int64) throws(ImageError) -> any NewImage

    /// The size that an image with a disk would have.
    func measure(
        _ disk: MeasuredDisk, _ options: TypedOptions
    ) async throws -> MeasuredSize
}

extension ImageCreator {
    public func newImage(
        like image: any Image, backingSize: Int64
    ) throws(ImageError) -> any NewImage {
        throw .unsupported(image.storage.name, "cannot be written into (-n)")
    }
}

/// An image that is to be made.
public protocol NewImage: Sendable {
    var parameters: ImageParameters { get }

    /// Places it on a backing file.
    ///
    /// - Parameter virtualSize: of the backing disk, in bytes.
    mutating func setBacking(_ backing: BackingName, virtualSize: Int64)

    /// Whether data and preallocation go together with a backing file.
    ///
    /// - Throws: `ImageError` if a conversion cannot make that.
    func checkBackedConversion() throws(ImageError)

    /// Checks that all goes together.
    func check() throws(ImageError)

    /// Begins the image.
    ///
    /// - Parameter size: of the guest disk, in bytes.
    func makeTarget(
        on storage: any WritableStorage, size: Int64, _ settings: TargetSettings
    ) async throws -> any ImageTarget

    /// Makes an image that holds nothing, or what its backing file holds.
    func makeEmpty(on storage: any WritableStorage, size: Int64) async throws
}

extension NewImage {
    public mutating func setBacking(_ backing: BackingName, virtualSize: Int64) {}

    public func checkBackedConversion() {}

    public func check() {}
}

/// The demands of a conversion on its target, whatever the format.
public struct TargetSettings: Sendable {
    public var compress = false
    /// Runs of zeros of at least this many bytes are not stored; 0 stores everything.
    public var minSparse: Int64
    /// Zeros are looked for also in what could be shared with the source unread.
    public var looksForZeros = false
    /// The storage was there before, and is written as it stands.
    public var isThere = false
    /// Parts that are not written read as zeros.
    public var readsAsZero = false

    public init(minSparse: Int64) { self.minSparse = minSparse }
}

/// A disk whose size in another image is asked for.
public struct MeasuredDisk: Sendable {
    /// In bytes, a multiple of the sector size.
    public var size: Int64
    /// It is that of an image, and not one with nothing in it.
    public var isImage = false
    /// The sum of the disk's data in bytes, in whole clusters of the given size.
    public var allocatedData: @Sendable (_ clusterSize: Int64) async throws -> Int64
    /// See `Image.bitmapsSize`.
    public var bitmapsSize: @Sendable (_ clusterSize: Int64) async throws -> Int64?

    /// A disk with nothing in it.
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
    /// The file with the disk's data in it.
    public var required: Int64
    /// The file with all clusters allocated.
    public var fullyAllocated: Int64
    /// The source's bitmaps; nil where there cannot be any.
    public var bitmaps: Int64?

    public init(required: Int64, fullyAllocated: Int64, bitmaps: Int64? = nil) {
        self.required = required
        self.fullyAllocated = fullyAllocated
        self.bitmaps = bitmaps
    }
}
