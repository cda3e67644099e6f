import DiskImage
import Synchronization

/// Buffers that nobody needs at the moment. Those used last are taken first: the others may never get pages.
public final class IOBufferPool: Sendable {
    /// Arrays hold nothing that cannot be copied. Touched by whoever made it, and from then on under the mutex.
    private final class Slot: @unchecked Sendable {
        var buffer: IOBuffer?
        init(_ buffer: consuming IOBuffer) { self.buffer = consume buffer }
    }

    private let free = Mutex<[Slot]>([])

    public init() {}

    /// - Parameter byteCount: how much it holds at least, in bytes. What it holds is anything.
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
