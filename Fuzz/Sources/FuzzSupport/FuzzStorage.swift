import Concurrency
import DiskImage
import ImageStorage
import Synchronization

/// An image in memory, on a device that is soon full, so that an input does not decide how much
/// memory the fuzzer takes.
public final class FuzzStorage: WritableStorage {
    public let readMeter = CallMeter()
    public let writeMeter = CallMeter()
    private static let capacity: Int64 = 4 << 20
    private let state: Mutex<[UInt8]>

    public init(_ bytes: [UInt8]) { state = Mutex(bytes) }

    public let name = "input"
    public let traits = StorageTraits(readsAsZero: true)
    public var bytes: [UInt8] { state.withLock { $0 } }
    public var size: Int64 { state.withLock { Int64($0.count) } }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let range = try checked(offset, Int64(buffer.byteCount))
        let found = try state.withLock { bytes in
            guard range.upperBound <= bytes.count else {
                throw ImageError.beyondEnd(self, range)
            }
            return Array(bytes[Int(range.lowerBound)..<Int(range.upperBound)])
        }
        buffer.withUnsafeMutableBytes { $0.copyBytes(from: found) }
    }

    public func write(_ source: RawSpan, at offset: Int64) async throws {
        try put(source.withUnsafeBytes { Array($0) }, at: offset)
    }

    public func zero(_ range: Range<Int64>, mayUnmap: Bool) async throws {
        guard range.count <= Self.capacity else { throw Self.full }
        try put([UInt8](repeating: 0, count: range.count), at: range.lowerBound)
    }

    public func truncate(to size: Int64) async throws {
        let size = Int(try checked(0, size).upperBound)
        guard size <= Self.capacity else { throw Self.full }
        state.withLock { bytes in
            Self.grow(&bytes, to: size)
            bytes.removeLast(bytes.count - size)
        }
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        precondition(offset >= 0 && offset < limit && limit <= size, "\(offset)..<\(limit)")
        return Extent(range: offset..<limit, isHole: false)
    }

    public func requireSpace(_ bytes: Int64) throws {
        if bytes > Self.capacity { throw Self.full }
    }

    public func flush() async throws {}

    private static let full = ImageError(.system(errno: 28), path: "input", "the device is full")

    /// Checks that a system call would not refuse the offset and length.
    private func checked(_ offset: Int64, _ count: Int64) throws -> Range<Int64> {
        let (end, overflow) = offset.addingReportingOverflow(count)
        precondition(offset >= 0 && count >= 0, "\(count) bytes at offset \(offset)")
        guard !overflow else { throw Self.full }
        return offset..<end
    }

    private func put(_ new: [UInt8], at offset: Int64) throws {
        let range = try checked(offset, Int64(new.count))
        guard range.upperBound <= Self.capacity else { throw Self.full }
        state.withLock { bytes in
            Self.grow(&bytes, to: Int(range.upperBound))
            bytes.replaceSubrange(Int(range.lowerBound)..<Int(range.upperBound), with: new)
        }
    }

    private static func grow(_ bytes: inout [UInt8], to size: Int) {
        if bytes.count < size { bytes += repeatElement(0, count: size - bytes.count) }
    }
}
