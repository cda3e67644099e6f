import DiskImage

/// A kind of storage: the names that mean it, and how it is opened. `ImageDrivers` has the list of
/// all drivers.
public protocol StorageDriver: Sendable {
    /// A word for messages, such as "NBD".
    var label: String { get }
    /// qemu's names for the storage in `json:` and `--image-opts` (`driver=…`).
    var names: [String] { get }
    /// Whether `resize` and `check -r` can change images in place here.
    var changesInPlace: Bool { get }
    /// Whether targets can have a checksum (`StorageTraits.hasChecksum`).
    var checksums: Bool { get }

    /// Whether a name means this kind of storage. The last driver of the list gets every name that
    /// no other driver claims.
    ///
    /// - Parameter isTyped: whether a person typed the name, and so may start programs and choose
    ///   keys. Other names stand in images.
    func claims(_ name: ImageName, isTyped: Bool) -> Bool

    /// - Throws: `ImageError` for a name that can never be opened.
    func check(_ name: ImageName) throws(ImageError)

    /// Makes a name from the options of a description (`json:`, `--image-opts`), and takes those
    /// that it understands.
    ///
    /// - Parameter prefix: text that stands before the keys.
    func name(
        from options: inout DescribedOptions, prefix: String
    ) throws(ImageError) -> ImageName

    /// The form in which qemu shows a name.
    func shownName(_ name: ImageName) -> String

    /// Whether qemu shows a described storage by its name, and not by its options.
    ///
    /// - Parameter options: those that the description has, but `driver`.
    func hasPlainName(describedBy options: [String: OptionValue]) -> Bool

    /// The name for a path that stands in an image of this storage; nil if paths cannot be
    /// resolved.
    func name(of path: HostPath, in image: ImageName) -> ImageName?

    /// Opens an existing storage for reading.
    func openSource(
        _ name: ImageName, _ access: StorageAccess
    ) throws(ImageError) -> any Storage

    /// Opens an existing storage for reading and writing, if `changesInPlace` is true.
    func openInPlace(
        _ name: ImageName, _ access: StorageAccess
    ) throws(ImageError) -> any WritableStorage

    /// Begins a target that is committed or abandoned later.
    func beginTarget(
        _ name: ImageName, _ request: TargetRequest
    ) throws(ImageError) -> any StorageTarget
}

extension StorageDriver {
    public var changesInPlace: Bool { false }

    public var checksums: Bool { false }

    public func check(_ name: ImageName) {}

    public func shownName(_ name: ImageName) -> String { name.description }

    public func hasPlainName(describedBy options: [String: OptionValue]) -> Bool { true }

    public func name(of path: HostPath, in image: ImageName) -> ImageName? { nil }

    public func openInPlace(
        _ name: ImageName, _ access: StorageAccess
    ) throws(ImageError) -> any WritableStorage {
        throw .unsupported(
            name.description, "images on \(label) cannot be changed in place")
    }
}

/// The options for opening images that all verbs have in common.
public struct StorageAccess: Sendable {
    public var cacheMode: CacheMode
    /// Whether to read images that another process writes to (`-U`).
    public var shareForced: Bool
    public var options: StorageOptions

    public init(
        cacheMode: CacheMode = .writeback, shareForced: Bool = false,
        options: StorageOptions = StorageOptions()
    ) {
        self.cacheMode = cacheMode
        self.shareForced = shareForced
        self.options = options
    }
}

/// Options of single drivers, keyed by type: code that only passes them on need not know them.
public struct StorageOptions: Sendable {
    private var values: [ObjectIdentifier: any Sendable] = [:]

    public init() {}

    public subscript<Options: Sendable>(_ type: Options.Type) -> Options? {
        get { values[ObjectIdentifier(type)] as? Options }
        set { values[ObjectIdentifier(type)] = newValue }
    }
}

/// A request to begin a target.
public struct TargetRequest: Sendable {
    public enum Manner: Sendable {
        /// Existing content is replaced when the target is complete.
        case create
        /// Existing content is overwritten in place (`-n`).
        case writeInto
    }

    public var access: StorageAccess
    public var manner: Manner
    /// Files that are read, and so must not be written.
    public var sourceFiles: Set<FileIdentity>
    /// Names of the sources, for storages that have no identity.
    public var sourceNames: [ImageName]
    /// Whether a source may be the target as well: each range is read before it is written.
    public var isCopyInPlace: Bool

    public init(
        _ manner: Manner, access: StorageAccess, sourceFiles: Set<FileIdentity> = [],
        sourceNames: [ImageName] = [], isCopyInPlace: Bool = false
    ) {
        self.manner = manner
        self.access = access
        self.sourceFiles = sourceFiles
        self.sourceNames = sourceNames
        self.isCopyInPlace = isCopyInPlace
    }
}

/// A storage that is being written, and then committed once or abandoned.
public protocol StorageTarget: Sendable {
    associatedtype Written: WritableStorage

    var storage: Written { get }

    /// Makes the written data count. Flushes first if the cache mode asks for it.
    func commit() async throws

    /// Undoes what can be undone.
    func abandon()
}

/// A target that is written in place: nothing can be undone.
public struct TargetInPlace<Written: WritableStorage>: StorageTarget {
    public let storage: Written

    public init(_ storage: Written) { self.storage = storage }

    public func commit() async throws { try await storage.flush() }

    public func abandon() {}
}
