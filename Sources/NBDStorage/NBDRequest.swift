import DiskImage
import ImageStorage
import Synchronization

/// A request that goes to a server in one message.
///
/// It belongs to the caller until it is submitted, and then to the thread of one connection. Until
/// the transfer ends, the caller keeps the request's memory alive and untouched.
final class NBDRequest: @unchecked Sendable {
    enum Operation {
        case read(UnsafeMutableRawBufferPointer)
        case write(UnsafeRawBufferPointer)
        case zero(count: Int64, ZeroManner)
        case trim(count: Int64)
        case flush
        case blockStatus(count: Int64)
    }

    /// The manner in which a server makes a range zero (NBD protocol, `NBD_CMD_WRITE_ZEROES`).
    enum ZeroManner {
        /// As a hole or with space.
        case asServerLikes
        /// As a hole or with space, but not at all if the server would have to write zeros.
        case onlyFast
        /// With space.
        case allocated
    }

    let operation: Operation
    let offset: Int64
    /// Whether a change is answered only when it is on stable storage (FUA).
    var writesThrough = false
    /// The transfer that waits for the request; set when it is sent.
    var transfer: NBDTransfer?
    /// The inbox of its connection, where it is put when it has ended.
    var inbox: NBDInbox?
    /// errno of the answer, or 0; nil while the request is in flight.
    var result: Int32?
    /// The answer to `blockStatus`: extents from `offset` on, without gaps.
    var extents: [Extent] = []

    init(_ operation: Operation, at offset: Int64) {
        self.operation = operation
        self.offset = offset
    }

    var isRead: Bool { if case .read = operation { true } else { false } }

    /// Whether it reads or changes the disk.
    var movesData: Bool {
        switch operation {
        case .read, .write, .zero, .trim: true
        case .flush, .blockStatus: false
        }
    }

    /// Length of the data that goes with it, in bytes.
    var payload: Int64 {
        switch operation {
        case .read(let memory): Int64(memory.count)
        case .write(let memory): Int64(memory.count)
        default: 0
        }
    }

    var isTrim: Bool { if case .trim = operation { true } else { false } }

    /// The beginning of an error message about it.
    var summary: String {
        switch operation {
        case .read(let memory): "cannot read \(memory.count) bytes at offset \(offset)"
        case .write(let memory): "cannot write \(memory.count) bytes at offset \(offset)"
        case .zero(let count, _): "cannot zero \(count) bytes at offset \(offset)"
        case .trim(let count): "cannot trim \(count) bytes at offset \(offset)"
        case .flush: "cannot flush on the server"
        case .blockStatus: "cannot get the block status at offset \(offset)"
        }
    }
}

/// Requests for which libnbd has called back. Guarded by the `access` of their connection.
final class NBDInbox {
    var finished: [NBDRequest] = []
}

/// Several requests that are one read, write or flush for the task that waits for them.
final class NBDTransfer: Sendable {
    private let continuation: CheckedContinuation<Void, any Error>
    private let state: Mutex<(remaining: Int, result: Result<Void, any Error>)>

    /// - Parameter count: number of requests.
    init(count: Int, _ continuation: CheckedContinuation<Void, any Error>) {
        self.continuation = continuation
        state = Mutex((count, .success(())))
    }

    /// Notes the end of a request. The last one resumes the waiting task with the first error.
    func finish(_ error: (any Error)? = nil) {
        let ended = state.withLock { state -> Result<Void, any Error>? in
            state.remaining -= 1
            if let error, case .success = state.result { state.result = .failure(error) }
            return state.remaining == 0 ? state.result : nil
        }
        if let ended { continuation.resume(with: ended) }
    }
}
