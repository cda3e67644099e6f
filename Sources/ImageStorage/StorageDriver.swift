import DiskImage

/// A kind of storage: which names mean it, and how it is opened. All of them stand in one list
/// (`ImageDrivers`).
public protocol StorageDriver: Sendable {
    /// A word for people: "NBD".
    var label: String { get }
    /// The names that `json:` and `--image-opts` have for it (`driver=…`), qemu's.
    var names: [String] { get }
    /// Its images can be changed where they are, by `resize` and `check -r`.
    var changesInPlace: Bool { get }

    /// Whether a name means this kind of storage. The last driver of the list is asked for what no
    /// other one claims.
    ///
    /// - Parameter isTyped: by a person, who may have programs started and may say which keys are
    ///   used. Other names stand in images.
    func claims(_ name: ImageName, isTyped: Bool) -> Bool

    /// - Throws: `ImageError` for a name that can never be opened.
    func check(_ name: ImageName) throws(ImageError)

    /// The name for what a description says (`json:`, `--image-opts`). Takes the options that it
    /// understands.
    ///
    /// - Parameter prefix: stands before the keys.
    func name(
        from options: inout DescribedOptions, prefix: String
    ) throws(ImageError) -> ImageName

    /// A name as qemu shows it.
    func shownName(_ name: ImageName) -> String

    /// The name for a path that stands in an image of this storage; nil where no path can be
    /// resolved.
    func name(of path: HostPath, in image: ImageName) -> ImageName?

    /// Opens what is there for reading.
    func openSource(
        _ name: ImageName, _ access: StorageAccess
    ) throws(ImageError) -> any Storage

    /// Opens what is there for reading and writing; for drivers that say `changesInPlace`.
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

    public func check(_ name: ImageName) {}

    public func shownName(_ name: ImageName) -> String { name.description }

    public func name(of path: HostPath, in image: ImageName) -> ImageName? { nil }

    public func openInPlace(
        _ name: ImageName, _ access: StorageAccess
    ) throws(ImageError) -> any WritableStorage {
        throw .unsupported(
            name.description, "an image behind \(label) cannot be changed where it is")
    }
}

/// How images are opened: what all verbs have in common.
public struct StorageAccess: Sendable {
    public var cacheMode: CacheMode
    /// Read images that another process writes to (`-U`).
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

/// The options of single drivers, by their types: those who pass them on need not know them.
public struct StorageOptions: Sendable {
    private var values: [ObjectIdentifier: any Sendable] = [:]

    public init() {}

    public subscript<Options: Sendable>(_ type: Options.Type) -> Options? {
        get { values[ObjectIdentifier(type)] as? Options }
        set { values[ObjectIdentifier(type)] = newValue }
    }
}

/// How a target is to be written.
public struct TargetRequest: Sendable {
    public enum Manner: Sendable {
        /// What is there is replaced when the target is whole.
        case create
        /// The same, and what is there is read meanwhile.
        case createBesideOld
        /// What is there is written as it stands (`-n`).
        case writeInto
    }

    public var access: StorageAccess
    public var manner: Manner
    /// Files that are read, and so must not be written.
    public var sourceFiles: Set<FileIdentity>
    /// The names of the sources, for storages that have no identity.
    public var sourceNames: [ImageName]
    /// A source may be the target as well: each range is read before it is written.
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

/// A storage that is being written, and is committed once or abandoned.
public protocol StorageTarget: Sendable {
    associatedtype Written: WritableStorage

    var storage: Written { get }

    /// Makes what was written count. Flushes first where the cache mode asks for it.
    func commit() async throws

    /// Takes back what can be taken back.
    func abandon()
}

/// A target that is written where it is: nothing can be taken back.
public struct TargetInPlace<Written: WritableStorage>: StorageTarget {
    public let storage: Written

    public init(_ storage: Written) { self.storage = storage }

    public func commit() async throws { try await storage.flush() }

    public func abandon() {}
}
