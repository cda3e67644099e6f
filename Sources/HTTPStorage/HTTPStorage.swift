import Concurrency
import DiskImage
import ImageStorage

/// A file on an HTTP server, for reading.
public final class HTTPStorage: Storage {
    /// Number of requests that keep a server near by busy, and their length in bytes. The window
    /// asks for more if the server is farther away.
    private static let requestsInFlight = 3
    /// Largest number of connections, unless the user gave another.
    static let connections = 16
    private static let requestSize: Int64 = 2 << 20

    public let name: String
    public let size: Int64
    public let traits: StorageTraits
    public let readMeter: CallMeter
    /// The first bytes of the file.
    private let head: [UInt8]
    /// The bytes behind them; nil if there are none.
    private let blocks: HTTPBlocks?

    /// Asks the server for the beginning of the file.
    ///
    /// - Returns: a stream if the server sends no ranges.
    /// - Throws: `ImageError`.
    static func open(
        _ address: HTTPAddress, _ options: HTTPOptions
    ) throws(ImageError) -> any Storage {
        let meter = CallMeter()
        let (version, head, rest) = try HTTPOpening.open(address, options, meter: meter)
        guard version.size <= largestDiskSize else {
            throw .tooLarge("cannot open", path: address.label)
        }
        let file: HTTPFile?
        switch rest {
        case .stream(let body):
            return StreamStorage(
                body, name: address.label, size: version.size, isRemote: true,
                advice: "the server sends no ranges, so download it first")
        case .ranges(let found): file = found
        case .none: file = nil
        }
        return HTTPStorage(
            address.label, size: version.size, head: head, file, options, meter: meter)
    }

    private init(
        _ name: String, size: Int64, head: [UInt8], _ rest: HTTPFile?, _ options: HTTPOptions,
        meter: CallMeter
    ) {
        self.name = name
        self.size = size
        self.head = head
        readMeter = meter
        blocks = rest.map { HTTPBlocks($0, from: Int64(head.count)) }
        traits = StorageTraits(
            isRemote: true,
            requestsInFlight: min(Self.requestsInFlight, options.connections ?? .max),
            requestSize: Self.requestSize, readsAhead: true)
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let range = offset..<offset + Int64(buffer.byteCount)
        guard range.upperBound <= size else { throw ImageError.beyondEnd(self, range) }
        // The span is borrowed until this call returns, so the memory stays alive.
        let memory = buffer.withUnsafeMutableBytes { $0 }
        let known = range.clamped(to: 0..<Int64(head.count))
        memory.copyBytes(from: head[Int(known.lowerBound)..<Int(known.upperBound)])
        guard range.upperBound > Int64(head.count) else { return }
        let unknown = max(range.lowerBound, Int64(head.count))..<range.upperBound
        let room = UnsafeMutableRawBufferPointer(rebasing: memory[known.count...])
        try await blocks?.read(unknown, into: room)
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        Extent(range: offset..<limit, isHole: false)
    }
}
