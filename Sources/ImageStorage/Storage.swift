import Concurrency
import DiskImage

/// The properties of a storage that a conversion has to know.
public struct StorageTraits: Sendable, Equatable {
    /// Whether the storage is a device: of fixed size, never new, never truncated.
    public var isDevice: Bool
    /// Whether the storage is behind a server, so that the state of the file there is unknown.
    public var isRemote: Bool
    /// Whether bytes that were never written read as zeros.
    public var readsAsZero: Bool
    /// Whether some ranges take no space, so that `extent` can tell more than "data".
    public var hasHoles: Bool
    /// Whether writes wait for each other, however many there are at once.
    public var writesOneByOne: Bool
    /// Number of concurrent requests that keep the storage busy, because each takes long to answer;
    /// 0 if a conversion's workers are enough.
    public var requestsInFlight: Int
    /// Best length of such a request in bytes; 0 if it does not matter.
    public var requestSize: Int64
    /// Whether short reads that follow each other are served from what was read ahead.
    public var readsAhead: Bool
    /// Whether the bytes come once, in order, so that reads must not be far apart.
    public var isStream: Bool
    /// Whether the size is an upper bound until the end has been reached.
    public var isOpenEnded: Bool
    /// Best unit of writes in bytes, a power of two; others work and take longer.
    public var blockSize: Int64
    /// Whether the server can tell the checksum of what it holds.
    public var hasChecksum: Bool

    public init(
        isDevice: Bool = false, isRemote: Bool = false, readsAsZero: Bool = false,
        hasHoles: Bool = false, writesOneByOne: Bool = false, requestsInFlight: Int = 0,
        requestSize: Int64 = 0, readsAhead: Bool = false, isStream: Bool = false,
        isOpenEnded: Bool = false, blockSize: Int64 = 1, hasChecksum: Bool = false
    ) {
        self.isDevice = isDevice
        self.isRemote = isRemote
        self.readsAsZero = readsAsZero
        self.hasHoles = hasHoles
        self.writesOneByOne = writesOneByOne
        self.requestsInFlight = requestsInFlight
        self.requestSize = requestSize
        self.readsAhead = readsAhead
        self.isStream = isStream
        self.isOpenEnded = isOpenEnded
        self.blockSize = blockSize
        self.hasChecksum = hasChecksum
    }
}

/// Bytes at offsets that can be read: a file, a block device, an export of a server. qemu calls
/// this a protocol.
///
/// Calls may come from many tasks at once. All errors are `ImageError`s.
public protocol Storage: BlockHolder {
    /// The path or URI by which people know the storage; every error message begins with it.
    var name: String { get }
    /// Size in bytes when the storage was opened or last truncated.
    var size: Int64 { get }
    var traits: StorageTraits { get }
    /// The file or device that holds the bytes; nil if it is not on this machine.
    var file: FileIdentity? { get }
    /// Number of bytes that the storage takes in its file system now; nil if unknown.
    var allocatedSize: Int64? { get }

    /// The meter of the calls that read data.
    var readMeter: CallMeter { get }

    /// Fills the whole buffer. Throws if the range reaches beyond the end.
    func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws

    /// The data or hole that begins at `offset`, as far as it reaches, up to `limit`.
    ///
    /// - Returns: an empty extent at the end of an open-ended storage.
    func extent(at offset: Int64, limit: Int64) async throws -> Extent

    /// Progress of an open-ended storage, whose size does not tell it; nil for others.
    var streamProgress: StreamProgress? { get }

    /// Reads what has not been read, if that tells whether the rest was right.
    func finishReading() async throws
}

/// A storage that can also be written.
public protocol WritableStorage: Storage {
    /// The meter of the calls that write data.
    var writeMeter: CallMeter { get }

    /// Writes all the bytes; a file grows as needed, a device does not.
    func write(_ bytes: RawSpan, at offset: Int64) async throws

    /// Writes parts of a buffer to several places, and returns when all are written.
    func writeRuns(_ runs: [BufferRun], of bytes: RawSpan) async throws

    /// Makes a range within the size read as zeros by the cheapest means there is.
    ///
    /// - Parameter mayUnmap: whether the range may stop being allocated.
    func zero(_ range: Range<Int64>, mayUnmap: Bool) async throws

    /// Sets the size. On a device, throws if the device is smaller, and does nothing otherwise.
    func truncate(to size: Int64) async throws

    /// Throws at once if `bytes` more bytes certainly cannot be stored here.
    func requireSpace(_ bytes: Int64) throws

    /// Returns when everything written is on stable storage (as far as the cache mode promises).
    func flush() async throws

    /// Has the server compute the checksum of all bytes, if `traits.hasChecksum` is true: the
    /// SHA-256 of the SHA-256s of all blocks in order.
    ///
    /// - Parameter blockSize: in bytes; the last block may be shorter.
    /// - Returns: 64 lower-case digits.
    func checksum(blockSize: Int64) async throws -> String

    /// Allocates the blocks of a range within the size; zeros in the range stay zeros.
    ///
    /// - Throws: `ImageError` in qemu-img's words if that is not supported or there is no space.
    func allocate(_ range: Range<Int64>, _ mode: Preallocation) throws(ImageError)

    /// Sets the attributes that can be set; none of them changes what the file holds.
    ///
    /// - Returns: a message about what could not be set; nil mostly.
    func apply(_ attributes: FileAttributes) -> String?

    /// Whether `share` is worth trying: true until it is known not to work here.
    var sharesBlocks: Bool { get }

    /// Makes the bytes from `offset` on equal to those of another storage, by sharing the blocks
    /// that hold them. Later writes to either place do not show in the other.
    ///
    /// - Parameter range: of the holder, in bytes; never empty.
    /// - Returns: number of bytes, from the first on, that are shared.
    func share(_ range: Range<Int64>, of holder: any BlockHolder, at offset: Int64) -> Int64

    /// Stops sharing if it cannot work with any of these sources.
    func stopSharing(unlessWith sources: [any Storage])
}

/// Attributes requested for a file that is to hold an image.
public struct FileAttributes: Sendable, Equatable {
    public var noCopyOnWrite = false
    /// Hint in bytes; nil or 0 leaves the size to the file system.
    public var extentSizeHint: Int64?

    public init() {}
}

/// Parts of a buffer that are written one after the other at one offset.
public struct BufferRun: Sendable, Equatable {
    /// Offset in bytes from the start of the storage.
    public var offset: Int64
    /// Byte positions in the buffer.
    public var parts: [Range<Int>]

    public init(offset: Int64, parts: [Range<Int>]) {
        self.offset = offset
        self.parts = parts
    }
}

extension Storage {
    public var file: FileIdentity? { nil }
    public var allocatedSize: Int64? { nil }
    public var streamProgress: StreamProgress? { nil }
    public func finishReading() async throws {}
}

extension WritableStorage {
    public func writeRuns(_ runs: [BufferRun], of bytes: RawSpan) async throws {
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

    public func checksum(blockSize: Int64) async throws -> String {
        throw ImageError.unsupported(name, "the checksum is not known")
    }

    public func apply(_ attributes: FileAttributes) -> String? { nil }

    public var sharesBlocks: Bool { false }

    public func share(_ range: Range<Int64>, of holder: any BlockHolder, at offset: Int64) -> Int64
    {
        0
    }

    public func stopSharing(unlessWith sources: [any Storage]) {}
}

/// The error for a read beyond the end of a storage: the image was cut short.
extension ImageError {
    public static func beyondEnd(_ storage: some Storage, _ range: Range<Int64>) -> ImageError {
        .corrupt(
            storage.name,
            "cannot read \(range.count) bytes at offset \(range.lowerBound): "
                + "the file ends at \(storage.size)")
    }
}
