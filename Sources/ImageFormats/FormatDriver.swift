import DiskImage
import ImageStorage

/// The operations on images of one format.
///
/// A format that can only be read needs no more than `name`, `recognizes` and `open(_:)`; its
/// creator, checker and resizer are nil.
public protocol FormatDriver: Sendable {
    /// qemu's name for the format.
    var name: String { get }

    /// Whether a storage begins like an image of this format.
    ///
    /// - Parameter start: the first 2048 bytes, or all bytes of a shorter storage.
    func recognizes(_ start: RawSpan) -> Bool

    /// Takes the options for this format out of a description (`json:`, `--image-opts`).
    ///
    /// - Parameters:
    ///   - prefix: text that precedes each key.
    ///   - described: receives the values of the options.
    func readOptions(
        from options: inout DescribedOptions, prefix: String, into described: inout DescribedFormat
    ) throws(ImageError)

    /// Opens an image without the backing file below it.
    ///
    /// - Throws: `ImageError` if the storage cannot be read as an image of this format.
    func open(_ storage: any Storage) async throws -> any Image

    /// Opens the disk as it was when an internal snapshot was taken.
    func open(_ storage: any Storage, snapshot: SnapshotName) async throws -> any Image

    /// Opens an image that may be encrypted; the other two ways to open are without its key.
    ///
    /// - Parameter snapshot: nil opens the disk as it is now.
    func open(
        _ storage: any Storage, snapshot: SnapshotName?, key: ImageKey
    ) async throws -> any Image

    /// Reads the facts about an image, even if its disk cannot be read (encrypted, damaged below
    /// its header).
    func facts(of storage: any Storage) async throws -> FormatFacts

    /// Whether every guest offset equals the offset in the storage.
    var isPlain: Bool { get }
    /// Whether an image can name a backing file.
    var canHaveBacking: Bool { get }

    var creator: (any ImageCreator)? { get }
    var checker: (any ImageChecker)? { get }
    var resizer: (any ImageResizer)? { get }
    var snapshotEditor: (any SnapshotEditor)? { get }
    var bitmapEditor: (any BitmapEditor)? { get }
    var overlayEditor: (any OverlayEditor)? { get }
    var amender: (any ImageAmender)? { get }
}

extension FormatDriver {
    public func readOptions(
        from options: inout DescribedOptions, prefix: String, into described: inout DescribedFormat
    ) {}

    public func open(_ storage: any Storage, snapshot: SnapshotName) async throws -> any Image {
        throw ImageError.unsupported(
            storage.name,
            "Failed to load snapshot: the format '\(name)' has no internal snapshots"
        ).asQemu(standsAlone: true)
    }

    public func open(
        _ storage: any Storage, snapshot: SnapshotName?, key: ImageKey
    ) async throws -> any Image {
        guard let snapshot else { return try await open(storage) }
        return try await open(storage, snapshot: snapshot)
    }

    public func facts(of storage: any Storage) async throws -> FormatFacts {
        FormatFacts(virtualSize: try await open(storage).guestSize)
    }

    public var isPlain: Bool { false }
    public var canHaveBacking: Bool { false }
    public var creator: (any ImageCreator)? { nil }
    public var checker: (any ImageChecker)? { nil }
    public var resizer: (any ImageResizer)? { nil }
    public var snapshotEditor: (any SnapshotEditor)? { nil }
    public var bitmapEditor: (any BitmapEditor)? { nil }
    public var overlayEditor: (any OverlayEditor)? { nil }
    public var amender: (any ImageAmender)? { nil }
}

/// The format's part of a described image (`json:`, `--image-opts`).
public struct DescribedFormat: Sendable, Equatable {
    /// A part of a storage.
    public struct Part: Sendable, Equatable {
        public var offset: Int64
        /// Size in bytes; nil reaches to the end of the storage.
        public var size: Int64?
    }

    /// Parts to cut out of the storage; the first is a part of the file, each other one a part of
    /// its predecessor.
    public var parts: [Part] = []
    public var encryption = DescribedEncryption()

    public init() {}
}

/// One image, open for reading, without its backing file. Everything that the image leaves to that
/// file is `.unallocated` and reads as zeros.
///
/// Most formats implement only `mappings`; reading follows from it.
public protocol Image: ImageSource, ImageLayer {
    var storage: any Storage { get }

    /// The storage that mappings of data lead to: `storage`, or that of the image's data file.
    var dataStorage: any Storage { get }

    /// Whether the data lies in another file. Such an image can only be read after
    /// `reading(dataFrom:)`.
    var needsDataFile: Bool { get }

    /// The path of the data file that the image names; nil if it names none.
    var dataFile: HostPath? { get }

    /// Returns the image with its data file.
    func reading(dataFrom storage: any Storage) -> any Image

    /// Size of the guest disk in bytes, in whole sectors as qemu counts them.
    var guestSize: Int64 { get }

    /// Whether the size of the disk is an upper bound until its end has been reached.
    var isOpenEnded: Bool { get }

    /// The backing file that the image names; nil if it names none.
    var backing: BackingName? { get }

    /// Whether many clusters have a place where the file has no blocks. qemu looks for holes below
    /// the clusters of such an image.
    func isPreallocated() async throws -> Bool

    /// Reads compressed clusters; the parameters are those of `read`.
    func readCompressed(
        _ mappings: ArraySlice<Mapping>, into buffer: inout MutableRawSpan
    ) async throws

    /// Reads encrypted bytes that follow each other in the storage.
    ///
    /// - Parameter mapping: its range is all of them.
    func readEncrypted(_ mapping: Mapping, into buffer: inout MutableRawSpan) async throws

    /// Space in bytes for copies of the image's persistent bitmaps in an image with clusters of
    /// `clusterSize` bytes; nil if the image cannot have bitmaps.
    func bitmapsSize(clusterSize: Int64) async throws -> Int64?
}

extension Image {
    public var dataStorage: any Storage { storage }
    public var needsDataFile: Bool { false }
    public var dataFile: HostPath? { nil }
    public func reading(dataFrom storage: any Storage) -> any Image { self }

    public var guestSize: Int64 { virtualSize.roundedDown(to: guestSectorSize) }
    public var isOpenEnded: Bool { false }
    public var backing: BackingName? { nil }

    public func isPreallocated() async throws -> Bool { false }

    public func readCompressed(
        _ mappings: ArraySlice<Mapping>, into buffer: inout MutableRawSpan
    ) async throws {
        preconditionFailure("a format with compressed clusters reads them itself")
    }

    public func readEncrypted(
        _ mapping: Mapping, into buffer: inout MutableRawSpan
    ) async throws {
        preconditionFailure("a format with encrypted clusters reads them itself")
    }

    public func bitmapsSize(clusterSize: Int64) async throws -> Int64? { nil }
}

/// Name and format of a backing file, as an image or a user gives them.
public struct BackingName: Sendable, Equatable {
    public var name: ImageName
    /// nil if the format has to be detected.
    public var format: String?

    public init(_ name: ImageName, format: String?) {
        self.name = name
        self.format = format
    }
}

/// Facts about an image for `info`, without its file names and the space that its file takes.
public struct FormatFacts: Sendable {
    /// Size of the guest disk in bytes, a multiple of the sector size.
    public var virtualSize: Int64
    /// Size of a cluster in bytes; nil for formats without clusters.
    public var clusterSize: Int64?
    public var backing: BackingName?
    /// Whether the image was not closed properly; nil if unknown.
    public var isDirty: Bool?
    public var isEncrypted = false
    public var snapshots: [ImageSnapshot] = []
    /// Facts that only this format has, with qemu's keys in qemu's order; nil if it has none.
    public var details: [JSONValue.Member]?
}

/// An internal snapshot of an image.
public struct ImageSnapshot: Sendable, Equatable {
    /// Id as bytes, mostly but not necessarily UTF-8; the name, too.
    public var id: [UInt8]
    public var name: [UInt8]
    /// Time of the snapshot in seconds since 1970 (UTC).
    public var seconds: UInt32
    public var nanoseconds: UInt32
    /// Time for which the guest had run, in nanoseconds.
    public var guestNanoseconds: UInt64
    /// Size of the saved machine state in bytes.
    public var stateSize: UInt64
    /// Number of instructions that the guest had executed; nil if they were not counted.
    public var instructionCount: UInt64?
}

/// Checks and repairs images of one format.
public protocol ImageChecker: Sendable {
    /// Checks an image without changing it.
    ///
    /// - Parameter onMessage: called with each finding, a single line.
    /// - Throws: `ImageError` if the check cannot go on.
    func check(
        _ storage: any Storage, onMessage: @escaping @Sendable (String) -> Void
    ) async throws -> CheckResult

    /// Checks an image and repairs the errors that `repair` selects.
    func repair(
        _ storage: any WritableStorage, _ repair: CheckRepair,
        onMessage: @escaping @Sendable (String) -> Void
    ) async throws -> CheckResult
}

/// Resizes images of one format in place.
public protocol ImageResizer: Sendable {
    /// Changes the size of the guest disk.
    ///
    /// - Parameters:
    ///   - key: to an image that may be encrypted.
    ///   - preallocation: mode for the new part of the disk.
    ///   - openBacking: opens the backing file of the image.
    ///   - openData: opens the data file of the image; returns nil if the image has none.
    ///   - newSize: called with the current size in bytes; returns the new size in bytes.
    /// - Throws: `ImageError` or `CancellationError`. The image is valid in any case.
    func resize(
        _ storage: any WritableStorage, key: ImageKey, preallocation: Preallocation,
        openBacking: (BackingName) async throws -> any ImageSource,
        openData: (any Image) throws -> (any WritableStorage)?,
        newSize: (_ current: Int64) throws -> Int64
    ) async throws
}

/// Takes, applies and deletes internal snapshots of images of one format.
public protocol SnapshotEditor: Sendable {
    /// - Parameter name: as bytes.
    /// - Throws: `ImageError`. The image is valid in any case; so are those of the other calls.
    func create(_ name: [UInt8], in storage: any WritableStorage) async throws

    /// Makes the disk what it was when the snapshot was taken.
    func apply(_ snapshot: SnapshotName, in storage: any WritableStorage) async throws

    func delete(_ snapshot: SnapshotName, in storage: any WritableStorage) async throws
}

/// Changes the relation of overlays of one format to their backing files.
public protocol OverlayEditor: Sendable {
    /// Checks that an image can have another backing file.
    ///
    /// - Parameter backing: nil for none.
    /// - Returns: an operation that changes the name and nothing else. Until it has returned, the
    ///   image has the old one.
    /// - Throws: `ImageError` in qemu-img's words, for names that the image has no room for.
    func prepareToRebase(
        _ storage: any WritableStorage, on backing: BackingName?
    ) async throws -> @Sendable () async throws -> Void

    /// Reads all metadata of an image that is to be emptied.
    ///
    /// - Parameter data: the data file; nil if the image holds its data itself.
    /// - Returns: an operation that drops all clusters of the disk, which then shows the backing
    ///   file. The image must not have changed meanwhile, and is valid in any case.
    /// - Throws: `ImageError` for images that have errors.
    func prepareToEmpty(
        _ storage: any WritableStorage, data: (any WritableStorage)?
    ) async throws -> @Sendable () async throws -> Void
}

/// Changes options of existing images of one format (`amend`).
public protocol ImageAmender: Sendable {
    /// The keys of `-o`.
    var options: [OptionDescription] { get }

    /// Makes the changes, one option after the other.
    ///
    /// - Parameters:
    ///   - key: to an image that may be encrypted.
    ///   - force: overwrites keys, and erases the last one.
    ///   - openBacking: opens the backing file of the image.
    ///   - openData: opens the data file of the image; returns nil if the image has none.
    /// - Throws: `ImageError` in qemu-img's words where qemu-img refuses as well, or
    ///   `CancellationError`. The image is valid in any case, and holds the same disk unless its
    ///   size changes.
    func amend(
        _ storage: any WritableStorage, _ options: TypedOptions, key: ImageKey, force: Bool,
        openBacking: (BackingName) async throws -> any ImageSource,
        openData: (any Image) throws -> (any WritableStorage)?
    ) async throws
}

/// Changes persistent bitmaps of images of one format.
public protocol BitmapEditor: Sendable {
    /// The bitmaps of an image; empty if it has none, nil if its version cannot have any.
    func bitmaps(of storage: any Storage) async throws -> [ImageBitmap]?

    /// Makes all changes, or none if one of them fails.
    ///
    /// - Throws: `ImageError` in qemu-img's words where qemu-img refuses as well.
    func change(_ storage: any WritableStorage, _ changes: [BitmapChange]) async throws
}

/// A persistent bitmap of an image.
public struct ImageBitmap: Sendable, Equatable {
    /// As bytes, mostly but not necessarily UTF-8.
    public var name: [UInt8]
    /// Length in bytes of the piece of disk that one bit stands for.
    public var granularity: Int64
    /// Whether it records all writes to the image.
    public var isEnabled: Bool
    /// Whether it was not saved properly, so that nothing is known but its name.
    public var isBroken: Bool
}

/// Changes to one persistent bitmap.
public struct BitmapChange: Sendable {
    public enum Action: Sendable, Equatable {
        /// Adds the bitmap; a granularity in bytes of nil is that of a cluster, within limits.
        case add(granularity: Int64?)
        case remove
        /// Removes all bitmaps of the image.
        case removeAll
        case clear
        case enable
        case disable
        /// Adds what another bitmap has set.
        case merge([UInt8])

        /// The word for messages.
        public var word: String {
            switch self {
            case .add: "add"
            case .remove: "remove"
            case .removeAll: "remove-all"
            case .clear: "clear"
            case .enable: "enable"
            case .disable: "disable"
            case .merge: "merge"
            }
        }
    }

    /// The name as bytes.
    public var name: [UInt8]
    public var actions: [Action]
    /// The image that holds bitmaps to merge; nil means the image itself.
    public var source: (any Storage)?
    /// Whether the source's disk may have another size: a conversion can make the disk larger.
    public var sourceMayDifferInSize = false

    public init(name: [UInt8], actions: [Action], source: (any Storage)? = nil) {
        self.name = name
        self.actions = actions
        self.source = source
    }
}
