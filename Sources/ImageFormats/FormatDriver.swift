import DiskImage
import ImageStorage

/// The operations on images of one format. A format that can only be read has its name, its
/// first bytes and `open`; all else is nil then.
public protocol FormatDriver: Sendable {
    /// qemu's name.
    var name: String { get }

    /// Whether a storage begins as images of this format do.
    ///
    /// - Parameter start: the first 2048 bytes, or all there are.
    func recognizes(_ start: RawSpan) -> Bool

    /// Takes the options that a description (`json:`, `--image-opts`) has for this format.
    ///
    /// - Parameter prefix: stands before the keys.
    func readOptions(
        from options: inout DescribedOptions, prefix: String, into described: inout DescribedFormat
    ) throws(ImageError)

    /// Opens an image without what it lies on.
    ///
    /// - Throws: `ImageError` for anything that cannot be read as an image of this format.
    func open(_ storage: any Storage) async throws -> any Image

    /// Opens the disk as it was when an internal snapshot was taken.
    func open(_ storage: any Storage, snapshot: SnapshotName) async throws -> any Image

    /// Describes an image, also one that cannot be read (encrypted, damaged below its header).
    func facts(of storage: any Storage) async throws -> FormatFacts

    /// The guest offset is the offset in the storage, for each byte.
    var isPlain: Bool { get }
    /// An image can name a backing file.
    var canHaveBacking: Bool { get }

    var creator: (any ImageCreator)? { get }
    var checker: (any ImageChecker)? { get }
    var resizer: (any ImageResizer)? { get }
}

extension FormatDriver {
    public func readOptions(
        from options: inout DescribedOptions, prefix: String, into described: inout DescribedFormat
    ) {}

    public func open(_ storage: any Storage, snapshot: SnapshotName) async throws -> any Image {
        throw ImageError.unsupported(
            storage.name,
            "Failed to load snapshot: the format '\(name)' has no internal snapshots")
    }

    public func facts(of storage: any Storage) async throws -> FormatFacts {
        FormatFacts(virtualSize: try await open(storage).guestSize)
    }

    public var isPlain: Bool { false }
    public var canHaveBacking: Bool { false }
    public var creator: (any ImageCreator)? { nil }
    public var checker: (any ImageChecker)? { nil }
    public var resizer: (any ImageResizer)? { nil }
}

/// The format's part of a described image (`json:`, `--image-opts`).
public struct DescribedFormat: Sendable, Equatable {
    /// A part of a storage.
    public struct Window: Sendable, Equatable {
        public var offset: Int64
        /// In bytes; nil reaches to the end.
        public var size: Int64?

        public init(offset: Int64, size: Int64?) {
            self.offset = offset
            self.size = size
        }
    }

    /// From the innermost out.
    public var windows: [Window] = []
    /// The backing file that the image names is not to be used.
    public var ignoresBacking = false

    public init() {}
}

/// One image, open for reading, without what it lies on: what it leaves to that is `.unallocated`,
/// and reads as zeros.
///
/// `mappings` is all that most formats have to say; reading follows from it.
public protocol Image: ImageSource, ImageLayer {
    var storage: any Storage { get }

    /// The size of the disk in bytes, in whole sectors as qemu counts them.
    var guestSize: Int64 { get }

    /// The file that the image lies on, as it names it; nil if there is none.
    var backing: BackingName? { get }

    /// Many clusters have a place, and the file has no blocks there: qemu looks for holes below
    /// them then.
    func isPreallocated() async throws -> Bool

    /// Reads compressed clusters; parameters as of `read`.
    func readCompressed(
        _ mappings: ArraySlice<Mapping>, into buffer: inout MutableRawSpan
    ) async throws

    /// Space in bytes that copies of the image's persistent bitmaps take in an image with clusters
    /// of this size in bytes; nil for images that cannot have any.
    func bitmapsSize(clusterSize: Int64) async throws -> Int64?
}

extension Image {
    public var guestSize: Int64 { virtualSize.roundedDown(to: guestSectorSize) }
    public var backing: BackingName? { nil }

    public func isPreallocated() async throws -> Bool { false }

    public func readCompressed(
        _ mappings: ArraySlice<Mapping>, into buffer: inout MutableRawSpan
    ) async throws {
        preconditionFailure("a format with compressed clusters reads them itself")
    }

    public func bitmapsSize(clusterSize: Int64) async throws -> Int64? { nil }
}

/// A backing file as an image, or a person, names it.
public struct BackingName: Sendable, Equatable {
    public var name: ImageName
    /// nil has to be found out.
    public var format: String?

    public init(_ name: ImageName, format: String?) {
        self.name = name
        self.format = format
    }
}

/// An image's facts for `info`, beside its names and the space that its file takes.
public struct FormatFacts: Sendable {
    /// In bytes, a multiple of the sector size.
    public var virtualSize: Int64
    /// In bytes; nil for formats without clusters.
    public var clusterSize: Int64?
    public var backing: BackingName?
    /// The image was not closed properly; nil if nothing could tell.
    public var isDirty: Bool?
    public var isEncrypted = false
    public var snapshots: [ImageSnapshot] = []
    /// The format's own part, with qemu's keys in its order; nil where there is none.
    public var details: [JSONValue.Member]?

    public init(virtualSize: Int64) { self.virtualSize = virtualSize }
}

/// An internal snapshot of an image.
public struct ImageSnapshot: Sendable, Equatable {
    /// Bytes: mostly, but not necessarily, UTF-8.
    public var id: [UInt8]
    public var name: [UInt8]
    /// The time when it was taken, since 1970 in UTC.
    public var seconds: UInt32
    public var nanoseconds: UInt32
    /// Time that the guest had run, in nanoseconds.
    public var guestNanoseconds: UInt64
    /// Size of the machine's state in bytes.
    public var stateSize: UInt64
    /// The number of instructions that the guest had executed; nil if they were not counted.
    public var instructionCount: UInt64?
}

/// Checks images of a format, and repairs them.
public protocol ImageChecker: Sendable {
    /// - Parameter onMessage: told of each finding, one line each.
    /// - Throws: `ImageError` where the check cannot go on.
    func check(
        _ storage: any Storage, onMessage: @escaping @Sendable (String) -> Void
    ) async throws -> CheckResult

    /// Checks an image and puts right what can be.
    func repair(
        _ storage: any WritableStorage, _ repair: CheckRepair,
        onMessage: @escaping @Sendable (String) -> Void
    ) async throws -> CheckResult
}

/// Changes the size of images of a format where they are.
public protocol ImageResizer: Sendable {
    /// - Parameters:
    ///   - preallocation: of what is new.
    ///   - openBacking: opens what the image lies on.
    ///   - newSize: is told the size and gives the one it is to have, in bytes.
    /// - Throws: `ImageError` or `CancellationError`. The image is valid in any case.
    func resize(
        _ storage: any WritableStorage, preallocation: Preallocation,
        openBacking: (BackingName) async throws -> any ImageSource,
        newSize: (_ current: Int64) throws -> Int64
    ) async throws
}
