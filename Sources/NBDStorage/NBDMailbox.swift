import ImageStorage
import Synchronization

/// What other threads leave for a connection while its loop, or somebody else, is busy with it.
final class NBDMailbox: Sendable {
    struct Content {
        var requests: [NBDRequest] = []
        /// No more will come.
        var isClosed = false
        /// What is in flight is to be given up.
        var isAborted = false
    }

    private let content = Mutex(Content())
    private let hasRequests = Atomic<Bool>(false)

    /// To be followed by an attempt to deal with it: whoever fails to get the connection leaves it to the one
    /// who has it, and who asks `isEmpty` afterwards.
    ///
    /// - Returns: false if nothing is accepted any more.
    func post(_ request: NBDRequest) -> Bool {
        let isAccepted = content.withLock {
            guard !$0.isAborted else { return false }
            $0.requests.append(request)
            hasRequests.store(true, ordering: .relaxed)
            return true
        }
        // Posted, then tried; released, then looked: one of the two sees the other.
        atomicMemoryFence(ordering: .sequentiallyConsistent)
        return isAccepted
    }

    func close() { content.withLock { $0.isClosed = true } }

    func abort() { content.withLock { $0.isAborted = true } }

    /// To be asked after the connection has been released.
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
