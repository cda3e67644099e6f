import Concurrency
import DiskImage
import ImageStorage

/// A file on an HTTP server, for reading.
public final class HTTPStorage: Storage {
    /// Number of requests that keep a server busy, and their length in bytes: enough for 20 ms on a
    /// fast network. The window asks for more if the server is farther away.
    private static let requestsInFlight = 8
    /// Largest number of connections, unless the user gave another.
    static let connections = 16
    private static let requestSize: Int64 = 2 << 20

    public let name: String
    public let size: Int64
    public let traits: StorageTraits
    public let readMeter = CallMeter()
    /// The first bytes of the file.
    private let head: [UInt8]
    private let rest: HTTPOpening.Rest
    private let blocks: HTTPBlocks?

    /// Asks the server for the beginning of the file.
    ///
    /// - Throws: `ImageError`.
    init(_ address: HTTPAddress, _ options: HTTPOptions) throws(ImageError) {
        name = address.label
        let (version, head, rest) = try HTTPOpening.open(address, options, meter: readMeter)
        self.head = head
        self.rest = rest
        size = version.size
        guard size <= largestDiskSize else { throw .tooLarge("cannot open", path: name) }
        if case .ranges(let file) = rest {
            blocks = HTTPBlocks(file, from: Int64(head.count))
        } else {
            blocks = nil
        }
        traits = StorageTraits(
            isRemote: true,
            requestsInFlight: min(Self.requestsInFlight, options.connections ?? .max),
            requestSize: Self.requestSize, readsAhead: true)
    }

    deinit { if case .stream(let stream) = rest { stream.close() } }

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
        switch rest {
        case .ranges: try await blocks?.read(unknown, into: room)
        case .stream(let stream): try await stream.read(unknown, into: room)
        case .none: break
        }
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        Extent(range: offset..<limit, isHole: false)
    }
}
