import Concurrency
import DiskImage
import Glibc
import Synchronization

/// A storage whose bytes come from a stream, so that they can be read once, nearly in order.
///
/// A read takes from the stream what lies before its end. The last bytes are kept, because the
/// reads of neighbours come in any order, and because an image may have its tables in front of its
/// data. A read of earlier bytes fails.
public final class StreamStorage: Storage, @unchecked Sendable {
    private final class Block {
        let memory: UnsafeMutableRawBufferPointer
        /// The bytes of the stream that the memory holds.
        var range: Range<Int64> = 0..<0

        init() throws(ImageError) {
            guard let start = malloc(StreamStorage.blockSize) else {
                throw .outOfMemory(StreamStorage.blockSize)
            }
            memory = UnsafeMutableRawBufferPointer(start: start, count: StreamStorage.blockSize)
        }

        deinit { free(memory.baseAddress) }
    }

    /// Number of bytes behind the stream's position that can be read: twice what conversions have
    /// in flight.
    static let reach: Int64 = 2 * inFlight
    /// Limit in bytes for what conversions read at once; see `StorageTraits.isStream`.
    public static let inFlight: Int64 = 8 << 20
    private static let blockSize = 1 << 20

    public let name: String
    public let file: FileIdentity?
    public let traits: StorageTraits
    public let readMeter = CallMeter()
    private let stream: any ByteStream
    /// The remedy for an image that cannot be read in one pass, for messages.
    private let advice: String
    private let end: Mutex<Int64>
    private let gate = SerialGate()
    // Used by the caller that the gate has let in:
    private var blocks: [Block] = []
    private var position: Int64 = 0
    private var hasEnded = false
    private var failure: (any Error)?

    /// - Parameters:
    ///   - size: in bytes; nil if the end of the stream tells it.
    ///   - file: that the stream comes from.
    ///   - isRemote: whether a server sends the stream.
    ///   - advice: completes the message about an image that cannot be read in one pass.
    public init(
        _ stream: any ByteStream, name: String, size: Int64?, file: FileIdentity? = nil,
        isRemote: Bool, advice: String
    ) {
        self.stream = stream
        self.name = name
        self.file = file
        self.advice = advice
        end = Mutex(size ?? largestDiskSize)
        traits = StorageTraits(isRemote: isRemote, isStream: true, isOpenEnded: size == nil)
    }

    /// Size in bytes; an upper bound until the end of an open-ended stream has been reached.
    public var size: Int64 { end.withLock { $0 } }

    public var streamProgress: StreamProgress? { traits.isOpenEnded ? stream.progress : nil }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let range = offset..<offset + Int64(buffer.byteCount)
        guard range.upperBound <= size else { throw ImageError.beyondEnd(self, range) }
        await gate.enter()
        defer { gate.leave() }
        try await advance(to: range.upperBound)
        guard range.upperBound <= position else { throw ImageError.beyondEnd(self, range) }
        guard range.lowerBound >= blocks.first?.range.lowerBound ?? position else {
            throw ImageError.unsupported(name, "the image cannot be read in one pass: \(advice)")
        }
        for block in blocks {
            let part = range.clamped(to: block.range)
            guard !part.isEmpty else { continue }
            let source = Int(part.lowerBound - block.range.lowerBound)
            let place = Int(part.lowerBound - offset)
            var room = buffer.slice(place..<place + part.count)
            room.withUnsafeMutableBytes {
                $0.copyBytes(from: block.memory[source..<source + part.count])
            }
        }
    }

    /// - Returns: data as far as it is known to reach; an empty extent behind the end of an
    ///   open-ended stream, which has ended then.
    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        guard traits.isOpenEnded else { return Extent(range: offset..<limit, isHole: false) }
        await gate.enter()
        defer { gate.leave() }
        try await advance(to: offset + 1)
        return Extent(range: offset..<max(offset, min(limit, position)), isHole: false)
    }

    /// Reads the rest of the stream, at whose end checksums are compared.
    ///
    /// - Throws: `ImageError` if they differ, or if the stream is longer or shorter than it should
    ///   be.
    public func finishReading() async throws {
        await gate.enter()
        defer { gate.leave() }
        try await advance(to: .max)
    }

    /// Reads on up to an offset, or to the end of the stream.
    private func advance(to offset: Int64) async throws {
        while position < offset, !hasEnded {
            if let failure { throw failure }
            do {
                try await readBlock()
            } catch {
                failure = error
                throw error
            }
        }
    }

    private func readBlock() async throws {
        // The oldest block's memory is used again: new memory would take as long as copying.
        let isFull = Int64(blocks.count) * Int64(Self.blockSize) >= Self.reach
        let block = isFull ? blocks.removeFirst() : try Block()
        var bytes = block.memory.mutableBytes
        let count = try await stream.read(into: &bytes)
        block.range = position..<position + Int64(count)
        blocks.append(block)
        position = block.range.upperBound
        guard count < Self.blockSize else { return }
        hasEnded = true
        guard traits.isOpenEnded || position == size else {
            throw ImageError.corrupt(name, "ends after \(position) of \(size) bytes")
        }
        end.withLock { $0 = position }
    }
}
