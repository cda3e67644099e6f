import DiskImage
import Synchronization

/// What is asked of a server in one message.
///
/// It belongs to the caller until it is submitted and to the thread of one connection from then on. The
/// memory it names is kept alive, and left alone, by the caller who waits for its transfer.
final class NBDRequest: @unchecked Sendable {
    enum Operation {
        case read(UnsafeMutableRawBufferPointer)
        case write(UnsafeRawBufferPointer)
        case zero(count: Int64, ZeroManner)
        case trim(count: Int64)
        case flush
        case blockStatus(count: Int64)
    }

    /// How a server is to make a range zero (NBD protocol, `NBD_CMD_WRITE_ZEROES`).
    enum ZeroManner {
        /// As a hole or with space.
        case asServerLikes
        /// In the same way, or not at all if it would have to write zeros.
        case onlyFast
        /// With space.
        case allocated
    }

    let operation: Operation
    let offset: Int64
    /// It is answered when it is on stable storage (FUA); for what changes the export.
    var writesThrough = false
    /// Who waits for it; set when it is sent.
    var transfer: NBDTransfer?
    /// Where it reports that it is done: of the connection that it was submitted to.
    var inbox: NBDInbox?
    /// An errno, or 0; nil while it is in flight.
    var result: Int32?
    /// The answer to `blockStatus`: from `offset` on without a gap.
    var extents: [Extent] = []

    init(_ operation: Operation, at offset: Int64) {
        self.operation = operation
        self.offset = offset
    }

    var isRead: Bool { if case .read = operation { true } else { false } }

    /// It reads or changes the disk.
    var movesData: Bool {
        switch operation {
        case .read, .write, .zero, .trim: true
        case .flush, .blockStatus: false
        }
    }

    /// The data that goes with it, in bytes.
    var payload: Int64 {
        switch operation {
        case .read(let memory): Int64(memory.count)
        case .write(let memory): Int64(memory.count)
        default: 0
        }
    }

    var isTrim: Bool { if case .trim = operation { true } else { false } }

    /// What it does, for messages.
    var summary: String {
        switch operation {
        case .read(let memory): "cannot read \(memory.count) bytes at offset \(offset)"
        case .write(let memory): "cannot write \(memory.count) bytes at offset \(offset)"
        case .zero(let count, _): "cannot zero \(count) bytes at offset \(offset)"
        case .trim(let count): "cannot trim \(count) bytes at offset \(offset)"
        case .flush: "cannot flush"
        case .blockStatus: "cannot get the block status at offset \(offset)"
        }
    }
}

/// Requests that the library has called back for: used by the connection's thread alone.
final class NBDInbox {
    var finished: [NBDRequest] = []
}

/// Several requests that are one read, write or flush to whoever waits for them.
final class NBDTransfer: Sendable {
    private struct State {
        var remaining: Int
        var error: (any Error)?
        var continuation: CheckedContinuation<Void, any Error>?
    }

    private let state: Mutex<State>

    /// - Parameter count: how many requests it has.
    init(count: Int, _ continuation: CheckedContinuation<Void, any Error>) {
        state = Mutex(State(remaining: count, continuation: continuation))
    }

    /// To be called once for each request. The last one resumes the waiter, with the first error.
    func finish(_ error: (any Error)? = nil) {
        let ended = state.withLock { state -> State? in
            state.remaining -= 1
            if state.error == nil { state.error = error }
            guard state.remaining == 0 else { return nil }
            defer { state.continuation = nil }
            return state
        }
        guard let continuation = ended?.continuation else { return }
        if let error = ended?.error {
            continuation.resume(throwing: error)
        } else {
            continuation.resume()
        }
    }
}
