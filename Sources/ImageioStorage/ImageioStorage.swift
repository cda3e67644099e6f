import Concurrency
import DiskImage
import Glibc
import HTTPStorage
import ImageStorage
import Synchronization

/// A disk of oVirt that an ovirt-imageio daemon serves.
public final class ImageioStorage: WritableStorage {
    /// Length of a request in bytes: each has to be answered before the next one on a connection.
    private static let requestSize: Int64 = 2 << 20

    public let name: String
    public let size: Int64
    public let traits: StorageTraits
    public let readMeter = CallMeter()
    public let writeMeter = CallMeter()
    private let server: ImageioServer
    /// The parts of the disk when it was opened.
    private let extents: ExtentList
    private let hasChanged = Atomic<Bool>(false)
    private let canZero: Bool
    private let canFlush: Bool

    /// Number of connections, unless the user gave another: enough for a daemon whose storage keeps
    /// each request waiting for 5 ms.
    private static let connections = 8

    /// - Throws: `ImageError` if the daemon cannot be reached, or refuses the ticket.
    init(
        _ address: ImageioAddress, _ options: HTTPOptions, forWriting: Bool
    ) throws(ImageError) {
        var options = options
        options.connections = options.connections ?? Self.connections
        let (server, features, parts) = try ImageioServer.open(
            address, options, forWriting: forWriting)
        self.server = server
        name = address.label
        var extents: [Extent] = []
        var end: Int64 = 0
        for part in parts where part.length != 0 {
            guard part.start == end, part.length > 0, part.length <= largestDiskSize - end else {
                throw ImageError(
                    .invalid, path: address.label,
                    "cannot open: the server's list of extents makes no sense")
            }
            end += part.length
            extents.append(Extent(range: part.start..<end, isHole: part.zero))
        }
        self.extents = ExtentList(extents)
        size = end
        canZero = features.features?.contains("zero") ?? false
        canFlush = features.features?.contains("flush") ?? false
        traits = StorageTraits(
            isDevice: true, isRemote: true, hasHoles: extents.contains(where: \.isHole),
            requestsInFlight: server.connections, requestSize: Self.requestSize,
            hasChecksum: features.features?.contains("checksum") ?? false)
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let range = offset..<offset + Int64(buffer.byteCount)
        guard !range.isEmpty else { return }
        guard range.upperBound <= size else { throw ImageError.beyondEnd(self, range) }
        // The span is borrowed until this call returns, so the memory stays alive.
        let memory = buffer.withUnsafeMutableBytes { $0 }
        readMeter.note(try await server.read(range, into: memory).timesOnOneConnection)
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        let isKnown = !hasChanged.load(ordering: .relaxed)
        return (isKnown ? extents.extent(at: offset, limit: limit) : nil)
            ?? Extent(range: offset..<limit, isHole: false)
    }

    public func write(_ bytes: RawSpan, at offset: Int64) async throws {
        guard bytes.byteCount > 0 else { return }
        try requireRoom(offset + Int64(bytes.byteCount))
        let memory = bytes.withUnsafeBytes { $0 }
        hasChanged.store(true, ordering: .relaxed)
        // A daemon that cannot be told to flush flushes each time.
        let outcome = try await server.write(memory, at: offset, flushes: !canFlush)
        writeMeter.note(outcome.timesOnOneConnection)
    }

    public func zero(_ range: Range<Int64>, mayUnmap: Bool) async throws {
        guard !range.isEmpty else { return }
        try requireRoom(range.upperBound)
        hasChanged.store(true, ordering: .relaxed)
        if canZero {
            try await server.zero(range)
        } else {
            try await writeZeros(range)
        }
    }

    public func truncate(to size: Int64) async throws { try requireRoom(size) }

    public func requireSpace(_ bytes: Int64) throws {}

    public func flush() async throws { if canFlush { try await server.flush() } }

    public func checksum(blockSize: Int64) async throws -> String {
        try await server.checksum(blockSize: blockSize)
    }

    private func requireRoom(_ end: Int64) throws(ImageError) {
        guard end > size else { return }
        throw ImageError(
            .system(errno: ENOSPC), path: name,
            "the disk is too small: \(size) bytes, needed are \(end): "
                + String(cString: strerror(ENOSPC)))
    }
}

extension HTTPRequest.Outcome {
    /// The times for a meter. All of it counts as work, because a connection carries one request at
    /// a time, and more chunks than connections would only wait for each other.
    fileprivate var timesOnOneConnection: CallTimes {
        .call(wall: times.elapsed, work: times.elapsed)
    }
}
