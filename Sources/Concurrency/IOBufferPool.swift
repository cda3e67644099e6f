import DiskImage
import Synchronization

/// Buffers that no task uses at the moment. The one used last is taken first, so that buffers used
/// less may never need pages.
public final class IOBufferPool: Sendable {
    /// A class, because arrays cannot hold noncopyable buffers. Its creator is the first to use it;
    /// from then on it is used under the mutex only.
    private final class Slot: @unchecked Sendable {
        var buffer: IOBuffer?
        init(_ buffer: consuming IOBuffer) { self.buffer = consume buffer }
    }

    private let free = Mutex<[Slot]>([])

    public init() {}

    /// - Parameter byteCount: smallest length of the buffer in bytes. Its content is undefined.
    public func take(byteCount: Int) throws(ImageError) -> IOBuffer {
        let last = free.withLock { $0.popLast()?.buffer.take() }
        if let last, last.byteCount >= byteCount { return last }
        return try IOBuffer(byteCount: byteCount)
    }

    public func giveBack(_ buffer: consuming IOBuffer) {
        let slot = Slot(buffer)
        free.withLock { $0.append(slot) }
    }
}
