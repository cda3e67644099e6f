import ImageStorage
import Synchronization

/// The messages that other threads leave for a connection while one thread uses it.
final class NBDMailbox: Sendable {
    struct Content {
        var requests: [NBDRequest] = []
        /// Whether no more requests will come.
        var isClosed = false
        /// Whether the requests in flight are to be given up.
        var isAborted = false
    }

    private let content = Mutex(Content())
    private let hasRequests = Atomic<Bool>(false)

    /// Leaves a request. The caller then tries to get the connection. If another thread has the
    /// connection, that thread does the work: it asks `isEmpty` after releasing the connection.
    ///
    /// - Returns: false if nothing is accepted any more.
    func post(_ request: NBDRequest) -> Bool {
        let isAccepted = content.withLock {
            guard !$0.isAborted else { return false }
            $0.requests.append(request)
            hasRequests.store(true, ordering: .relaxed)
            return true
        }
        // This thread posts, then tries to lock; another unlocks, then looks: one sees the other.
        atomicMemoryFence(ordering: .sequentiallyConsistent)
        return isAccepted
    }

    func close() { content.withLock { $0.isClosed = true } }

    func abort() { content.withLock { $0.isAborted = true } }

    /// Whether no request is left. Check it after the connection has been released.
    var isEmpty: Bool {
        atomicMemoryFence(ordering: .sequentiallyConsistent)
        return !hasRequests.load(ordering: .relaxed)
    }

    var isAborted: Bool { content.withLock { $0.isAborted } }

    func take() -> Content {
        content.withLock { content in
            defer { content.requests = [] }
            hasRequests.store(false, ordering: .relaxed)
            return content
        }
    }
}
