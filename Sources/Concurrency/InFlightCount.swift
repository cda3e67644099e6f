import Synchronization

/// Counts operations that are on their way, and lets one caller wait until there are none.
package final class InFlightCount: Sendable {
    private let state = Mutex(InFlightState<CheckedContinuation<Void, any Error>>())

    package init() {}

    package func begin() { state.withLock { $0.begin() } }

    package func end() { state.withLock { $0.end() }?.resume() }

    /// Waits until every operation that has begun has ended. None may begin meanwhile.
    ///
    /// - Throws: `CancellationError`, because an operation that fails does not end.
    package func drain() async throws {
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                switch state.withLock({ $0.arrive(continuation) }) {
                case .enter: continuation.resume()
                case .wait: break
                case .giveUp: continuation.resume(throwing: CancellationError())
                }
            }
        } onCancel: {
            state.withLock { $0.cancel() }?.resume(throwing: CancellationError())
        }
    }
}

/// The state of an `InFlightCount`, which resumes the waiters that it gets from here.
struct InFlightState<Waiter> {
    enum Arrival { case enter, wait, giveUp }

    private var count = 0
    private var waiter: Waiter?
    private var isCancelled = false

    mutating func begin() { count += 1 }

    /// - Returns: the waiter to resume if this was the last operation.
    mutating func end() -> Waiter? {
        count -= 1
        return count == 0 ? waiter.take() : nil
    }

    mutating func arrive(_ waiter: Waiter) -> Arrival {
        if isCancelled { return .giveUp }
        if count == 0 { return .enter }
        self.waiter = waiter
        return .wait
    }

    /// - Returns: the waiter to resume; later ones give up at once.
    mutating func cancel() -> Waiter? {
        isCancelled = true
        return waiter.take()
    }
}
