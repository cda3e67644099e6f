import DiskImage
import Synchronization

/// Bytes that can be read once, from front to back: the body of an answer, a compressed file.
public protocol ByteStream: AnyObject, Sendable {
    /// Reads the next bytes. There is one call at a time.
    ///
    /// - Returns: number of bytes read; fewer than the buffer holds only at the end.
    /// - Throws: `ImageError` if the bytes cannot be read or are not what they should be, or
    ///   `CancellationError`.
    func read(into buffer: inout MutableRawSpan) async throws -> Int

    /// Progress in the file that the bytes come from; nil if unknown. For any caller.
    var progress: StreamProgress? { get }
}

/// The numbers of bytes that were read of a file, and that it has.
public struct StreamProgress: Sendable {
    public var done: Int64
    public var total: Int64
}

/// The bytes of a whole storage, front to back.
public final class StorageStream: ByteStream {
    private let storage: any Storage
    private let position = Atomic<Int64>(0)

    public init(_ storage: any Storage) { self.storage = storage }

    public func read(into buffer: inout MutableRawSpan) async throws -> Int {
        let position = position.load(ordering: .relaxed)
        let count = Int(min(Int64(buffer.byteCount), storage.size - position))
        guard count > 0 else { return 0 }
        var part = buffer.slice(0..<count)
        try await storage.read(into: &part, at: position)
        self.position.store(position + Int64(count), ordering: .relaxed)
        return count
    }

    public var progress: StreamProgress? {
        StreamProgress(done: position.load(ordering: .relaxed), total: storage.size)
    }
}
