import DiskImage
import Synchronization

/// The memory of one chunk on its way.
struct ChunkBuffers: ~Copyable {
    /// The chunk as the guest sees it.
    var data: IOBuffer
    /// Its compressed clusters.
    var encoded: IOBuffer
}

/// Buffers that no chunk needs at the moment. Those used last are taken first: the others may never get pages.
final class BufferPool: Sendable {
    /// Arrays hold nothing that cannot be copied. Touched by whoever made it, and from then on under the mutex.
    private final class Slot: @unchecked Sendable {
        var buffers: ChunkBuffers?
        init(_ buffers: consuming ChunkBuffers) { self.buffers = consume buffers }
    }

    private let free = Mutex<[Slot]>([])
    private let dataSize: Int
    private let encodedSize: Int

    /// - Parameters: sizes of the buffers in bytes.
    init(dataSize: Int, encodedSize: Int) {
        self.dataSize = dataSize
        self.encodedSize = encodedSize
    }

    func take() -> ChunkBuffers {
        let last = free.withLock { $0.popLast()?.buffers.take() }
        return last
            ?? ChunkBuffers(
                data: IOBuffer(byteCount: dataSize), encoded: IOBuffer(byteCount: encodedSize))
    }

    func giveBack(_ buffers: consuming ChunkBuffers) {
        let slot = Slot(buffers)
        free.withLock { $0.append(slot) }
    }
}
