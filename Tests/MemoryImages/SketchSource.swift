import Concurrency
import DiskImage
import ImageStorage
import Synchronization

/// A guest disk drawn as text, one character per block: `A`…`Z` data, `a`…`n` compressed data, `0`
/// zeros, `-` left to the backing file, `o` data that is all zeros.
public final class SketchSource: ImageSource, ImageLayer {
    public let readGranularity: Int64 = 1
    public let holder: (any BlockHolder)? = nil
    private let sketch: [Character]
    private let blockSize: Int64
    /// Offset in bytes beyond which requests for mappings or bytes fail.
    private let failsFrom: Int64
    /// Offset in bytes beyond which a read waits until its task is cancelled.
    private let stallsFrom: Int64
    private let readers = Mutex((now: 0, most: 0))
    private let pause: Bool
    /// Number of times that a paused read lets others go first.
    private let readPause: ClosedRange<Int>
    /// Reports five milliseconds of waiting for each paused read.
    public let meter = CallMeter()

    public init(
        _ sketch: String, blockSize: Int64, failsFrom: Int64 = .max, stallsFrom: Int64 = .max,
        pause: Bool = false, readPause: ClosedRange<Int> = 0...5
    ) {
        self.sketch = Array(sketch)
        self.blockSize = blockSize
        self.failsFrom = failsFrom
        self.stallsFrom = stallsFrom
        self.pause = pause
        self.readPause = readPause
    }

    public var virtualSize: Int64 { Int64(sketch.count) * blockSize }

    /// Largest number of concurrent reads.
    public var mostReaders: Int { readers.withLock { $0.most } }

    /// The bytes that the guest reads; `-` reads as zeros.
    public var bytes: [UInt8] {
        sketch.flatMap { repeatElement(Self.byte($0), count: Int(blockSize)) }
    }

    private static func byte(_ character: Character) -> UInt8 {
        "0-o".contains(character) ? 0 : character.asciiValue ?? 0
    }

    public var layers: [any ImageLayer] { [self] }
    public func isSparse() async throws -> Bool { false }

    public func mappings(
        at offset: Int64, limit: Int64, holes: HoleSearch
    ) async throws -> [Mapping] {
        if pause { await Task.yield() }
        if offset >= failsFrom { throw MemoryStorage.failure }
        // One block at a time: the caller has to join them.
        let block = offset / blockSize
        let content: Mapping.Content =
            switch sketch[Int(block)] {
            case "0": .zero
            case "-": .unallocated
            case "a"..."n": .compressed
            default: .data
            }
        return [Mapping(offset..<min(limit, (block + 1) * blockSize), content)]
    }

    public func read(
        _ mappings: ArraySlice<Mapping>, into buffer: inout MutableRawSpan
    ) async throws {
        let offset = mappings.first?.layerOffset ?? 0
        readers.withLock {
            $0.now += 1
            $0.most = max($0.most, $0.now)
        }
        defer { readers.withLock { $0.now -= 1 } }
        if pause {
            for _ in 0..<Int.random(in: readPause) { await Task.yield() }
            meter.note(.call(wall: 5_000_000, work: 50_000))
        }
        if offset + Int64(buffer.byteCount) > failsFrom { throw MemoryStorage.failure }
        if offset + Int64(buffer.byteCount) > stallsFrom {
            try await Task.sleep(for: .seconds(600))
        }
        var position = 0
        while position < buffer.byteCount {
            let block = (offset + Int64(position)) / blockSize
            let end = min(buffer.byteCount, Int((block + 1) * blockSize - offset))
            var part = buffer.slice(position..<end)
            part.withUnsafeMutableBytes {
                _ = $0.initializeMemory(as: UInt8.self, repeating: Self.byte(sketch[Int(block)]))
            }
            position = end
        }
    }
}

/// Reads a whole guest disk.
public func readAll(_ source: some ImageSource) async throws -> [UInt8] {
    var buffer = try IOBuffer(byteCount: Int(source.virtualSize))
    var span = buffer.mutableBytes
    if source.virtualSize > 0 { try await source.read(into: &span, at: 0) }
    return buffer.bytes.withUnsafeBytes { Array($0) }
}

extension BufferOrigin {
    /// The origin of bytes that a test has made up.
    public static var nowhere: BufferOrigin {
        BufferOrigin(layers: [], mappings: [], start: 0)
    }
}
