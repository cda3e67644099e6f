import Concurrency
import DiskImage
import ImageStorage
import Synchronization

/// A storage in memory that records its operations and can be told to fail.
public final class MemoryStorage: WritableStorage {
    public let readMeter = CallMeter()
    public let writeMeter = CallMeter()
    public enum Operation: Sendable, Equatable {
        case read(Range<Int64>)
        case write(Range<Int64>)
        case zero(Range<Int64>)
        case truncate(Int64)
        case flush
    }

    /// A change of the content, with which a crash between two changes can be played.
    public enum Change: Sendable {
        case write(Int, [UInt8])
        case zero(Range<Int>)
        case truncate(Int)
        case flush

        public func apply(to bytes: inout [UInt8]) {
            switch self {
            case .write(let offset, let new):
                MemoryStorage.grow(&bytes, to: offset + new.count)
                bytes.replaceSubrange(offset..<offset + new.count, with: new)
            case .zero(let range):
                MemoryStorage.grow(&bytes, to: range.upperBound)
                bytes.replaceSubrange(range, with: repeatElement(0, count: range.count))
            case .truncate(let size):
                MemoryStorage.grow(&bytes, to: size)
                bytes.removeLast(bytes.count - size)
            case .flush: break
            }
        }
    }

    private struct State {
        var bytes: [UInt8]
        var changes: [Change] = []
        var operations: [Operation] = []
        var failing = 0..<0
        var writers = (now: 0, most: 0)
    }

    public let name: String
    public let traits: StorageTraits
    private let writePause: Duration?
    private let state: Mutex<State>

    /// - Parameter writePause: time that each write takes.
    public init(
        _ bytes: [UInt8] = [], name: String = "memory",
        traits: StorageTraits = StorageTraits(readsAsZero: true), writePause: Duration? = nil
    ) {
        self.writePause = writePause
        self.name = name
        self.traits = traits
        state = Mutex(State(bytes: bytes))
    }

    public var bytes: [UInt8] { state.withLock { $0.bytes } }
    public var operations: [Operation] { state.withLock { $0.operations } }
    public var size: Int64 { state.withLock { Int64($0.bytes.count) } }

    /// Largest number of writes at once, counted only with a pause.
    public var mostWriters: Int { state.withLock { $0.writers.most } }

    /// Makes operations from this number on (0 is the next one) fail with ENOSPC.
    public func fail(at number: Int, count: Int = 1) {
        state.withLock {
            let first = $0.operations.count + number
            $0.failing = first..<first + count
        }
    }

    public static let failure = ImageError(.system(errno: 28), path: "memory", "told to fail")

    private func perform<T>(
        _ operation: Operation, _ body: (inout [UInt8]) throws -> T
    ) throws -> T {
        try state.withLock { state in
            defer { state.operations.append(operation) }
            if state.failing.contains(state.operations.count) { throw Self.failure }
            return try body(&state.bytes)
        }
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let range = offset..<offset + Int64(buffer.byteCount)
        let found = try perform(.read(range)) { bytes in
            guard range.upperBound <= bytes.count else {
                throw ImageError.beyondEnd(self, range)
            }
            return Array(bytes[Int(range.lowerBound)..<Int(range.upperBound)])
        }
        buffer.withUnsafeMutableBytes { $0.copyBytes(from: found) }
    }

    public func write(_ source: RawSpan, at offset: Int64) async throws {
        let new = source.withUnsafeBytes { Array($0) }
        if let writePause {
            state.withLock {
                $0.writers.now += 1
                $0.writers.most = max($0.writers.most, $0.writers.now)
            }
            try await Task.sleep(for: writePause)
            state.withLock { $0.writers.now -= 1 }
        }
        try change(.write(offset..<offset + Int64(new.count)), .write(Int(offset), new))
    }

    public func zero(_ range: Range<Int64>, mayUnmap: Bool) async throws {
        try change(.zero(range), .zero(Int(range.lowerBound)..<Int(range.upperBound)))
    }

    private func change(_ operation: Operation, _ change: Change) throws {
        try perform(operation) { bytes in change.apply(to: &bytes) }
        state.withLock { $0.changes.append(change) }
    }

    /// All changes that were made, in their order.
    public var changes: [Change] { state.withLock { $0.changes } }

    fileprivate static func grow(_ bytes: inout [UInt8], to size: Int) {
        if bytes.count < size { bytes += repeatElement(0, count: size - bytes.count) }
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        Extent(range: offset..<limit, isHole: false)
    }

    public func truncate(to size: Int64) async throws {
        try change(.truncate(size), .truncate(Int(size)))
    }

    public func requireSpace(_ bytes: Int64) throws {}

    public func flush() async throws { try change(.flush, .flush) }
}
