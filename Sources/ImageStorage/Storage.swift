import Concurrency
import DiskImage

/// What a conversion has to know about the place where bytes live.
public struct StorageTraits: Sendable, Equatable {
    /// A device: of fixed size, never new, never truncated.
    public var isDevice: Bool
    /// Behind a server: what it is at is that server's business.
    public var isRemote: Bool
    /// Bytes that were never written read as zeros.
    public var readsAsZero: Bool
    /// Some of its ranges take no space, so that `extent` can tell more than "data".
    public var hasHoles: Bool
    /// Writes wait for each other, however many there are at once.
    public var writesOneByOne: Bool
    /// How many requests it wants at once to be busy: what is far away takes long to answer each. 0
    /// where there is no need for more than a conversion's workers.
    public var requestsInFlight: Int
    /// How long each of those is best, in bytes; 0 where it does not matter.
    public var requestSize: Int64
    /// What writes should be multiples of, a power of two, in bytes; others work and take longer.
    public var blockSize: Int64

    public init(
        isDevice: Bool = false, isRemote: Bool = false, readsAsZero: Bool = false,
        hasHoles: Bool = false, writesOneByOne: Bool = false, requestsInFlight: Int = 0,
        requestSize: Int64 = 0,
        blockSize: Int64 = 1
    ) {
        self.isDevice = isDevice
        self.isRemote = isRemote
        self.readsAsZero = readsAsZero
        self.hasHoles = hasHoles
        self.writesOneByOne = writesOneByOne
        self.requestsInFlight = requestsInFlight
        self.requestSize = requestSize
        self.blockSize = blockSize
    }
}

/// Bytes at offsets to be read: a file, a block device, an export of a server. qemu calls this a protocol.
///
/// Calls may come from many tasks at once. Everything throws `ImageError`.
public protocol Storage: BlockHolder {
    /// What people call it: a path, a URI. It opens every error message.
    var name: String { get }
    /// In bytes, when it was opened or last truncated.
    var size: Int64 { get }
    var traits: StorageTraits { get }
    /// The file or device in which the bytes are; nil if that is not on this machine.
    var file: FileIdentity? { get }
    /// How much of its file system it takes now, in bytes; nil if nothing tells.
    var allocatedSize: Int64? { get }

    /// The meter of the calls that read data.
    var readMeter: CallMeter { get }

    /// Fills the whole buffer. Throws where the range reaches beyond the end.
    func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws

    /// Whether data or a hole (`.zero`) begins at `offset`, and how far it reaches, up to `limit`.
    func extent(at offset: Int64, limit: Int64) async throws -> Extent

    /// The most exact answer to the same question, as far as it goes, where no waiting is needed for
    /// it; nil elsewhere.
    func allocation(at offset: Int64) -> Extent?
}

/// A storage that can be written, too.
public protocol WritableStorage: Storage {
    /// The meter of the calls that write data.
    var writeMeter: CallMeter { get }

    /// Writes all the bytes; a file grows as needed, a device does not.
    func write(_ bytes: RawSpan, at offset: Int64) async throws

    /// Writes parts of a buffer to several places, all of them before it returns.
    func write(_ runs: [BufferRun], of bytes: RawSpan) async throws

    /// Makes a range within the size read as zeros by the cheapest means there is.
    ///
    /// - Parameter mayUnmap: the range need not stay allocated.
    func zero(_ range: Range<Int64>, mayUnmap: Bool) async throws

    /// Sets the size. On a device: throws if it is smaller than that, and does nothing otherwise.
    func truncate(to size: Int64) async throws

    /// Throws at once if `bytes` more certainly cannot be stored here.
    func requireSpace(_ bytes: Int64) throws

    /// Returns when everything written is on stable storage (as far as the cache mode promises).
    func flush() async throws

    /// Takes the blocks of a range within the size, which reads as zeros afterwards where it did before.
    ///
    /// - Throws: `ImageError` in qemu-img's words where there is no such thing, or no space.
    func allocate(_ range: Range<Int64>, _ mode: Preallocation) throws(ImageError)

    /// Does what can be done of what a file is asked for; none of that changes what it holds.
    ///
    /// - Returns: what could not be done, in words; nil mostly.
    func apply(_ attributes: FileAttributes) -> String?

    /// Whether `share` is worth trying: true until it is known not to work here.
    var sharesBlocks: Bool { get }

    /// Makes the bytes from `offset` on the same as those at a location, by sharing the blocks that
    /// hold them. What is written to either afterwards does not show in the other.
    ///
    /// - Returns: for how many of them, from the first on, that was possible.
    func share(_ location: HostLocation, at offset: Int64) -> Int64

    /// Stops sharing where it cannot work with any of these sources.
    func stopSharing(unlessWith sources: [any Storage])
}

/// What a file that is to hold an image is asked for beside its bytes.
public struct FileAttributes: Sendable, Equatable {
    public var noCopyOnWrite = false
    /// In bytes; nil or 0 leaves it to the file system.
    public var extentSizeHint: Int64?

    public init() {}
}

/// Parts of a buffer that are written one behind the other.
public struct BufferRun: Sendable, Equatable {
    /// In bytes from the start of the storage.
    public var offset: Int64
    /// Positions in the buffer.
    public var parts: [Range<Int>]

    public init(offset: Int64, parts: [Range<Int>]) {
        self.offset = offset
        self.parts = parts
    }
}

extension Storage {
    public var file: FileIdentity? { nil }
    public var allocatedSize: Int64? { nil }

    public func allocation(at offset: Int64) -> Extent? { nil }
}

extension WritableStorage {
    public func write(_ runs: [BufferRun], of bytes: RawSpan) async throws {
        for run in runs {
            var offset = run.offset
            for part in run.parts {
                try await write(bytes.extracting(part), at: offset)
                offset += Int64(part.count)
            }
        }
    }

    public func allocate(_ range: Range<Int64>, _ mode: Preallocation) throws(ImageError) {
        throw .unsupported(name, "Unsupported preallocation mode '\(mode.rawValue)'")
    }

    public func apply(_ attributes: FileAttributes) -> String? { nil }

    public var sharesBlocks: Bool { false }

    public func share(_ location: HostLocation, at offset: Int64) -> Int64 { 0 }

    public func stopSharing(unlessWith sources: [any Storage]) {}
}

/// A piece of bytes of an image that lies beyond its end: the image was cut short.
extension ImageError {
    public static func beyondEnd(_ storage: some Storage, _ range: Range<Int64>) -> ImageError {
        .corrupt(
            storage.name,
            "cannot read \(range.count) bytes at offset \(range.lowerBound): "
                + "the file ends at \(storage.size)")
    }
}
