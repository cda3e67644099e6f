import Synchronization

/// Lets callers through one at a time, in the order in which they come. An actor would let the next
/// caller in while the first one waits for something.
package final class SerialGate: Sendable {
    private let line = Mutex(WaitingLine<CheckedContinuation<Void, Never>>())

    package init() {}

    /// Waits for a turn, also in a cancelled task. Each caller that enters has to leave.
    package func enter() async {
        if line.withLock({ $0.enter() }) { return }
        await withCheckedContinuation { continuation in
            let isInside = line.withLock { $0.arrive(continuation) }
            if isInside { continuation.resume() }
        }
    }

    package func leave() { line.withLock { $0.leave() }?.resume() }
}

/// The state of a `SerialGate`: whether a caller is inside, and the callers that wait. The gate
/// resumes the waiters that it gets from here.
struct WaitingLine<Waiter> {
    private var isTaken = false
    private var waiters: [Waiter] = []

    mutating func enter() -> Bool {
        defer { isTaken = true }
        return !isTaken
    }

    /// Enters, or makes the waiter wait. Returns whether the caller is inside.
    mutating func arrive(_ waiter: Waiter) -> Bool {
        if enter() { return true }
        waiters.append(waiter)
        return false
    }

    /// - Returns: the waiter that is inside now; nil if none has waited.
    mutating func leave() -> Waiter? {
        isTaken = !waiters.isEmpty
        return isTaken ? waiters.removeFirst() : nil
    }
}
