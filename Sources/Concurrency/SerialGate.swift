import Synchronization

/// Lets callers through one at a time in the order in which they come. An actor would let the next
/// caller in while the first one waits for something.
package final class SerialGate: Sendable {
    private let line = Mutex(WaitingLine<CheckedContinuation<Void, Never>>())

    package init() {}

    /// Each caller that enters has to leave. A cancelled task gets its turn, too, to find that out.
    package func enter() async {
        if line.withLock({ $0.enter() }) { return }
        await withCheckedContinuation { continuation in
            let isInside = line.withLock { $0.arrive(continuation) }
            if isInside { continuation.resume() }
        }
    }

    package func leave() { line.withLock { $0.leave() }?.resume() }
}

/// Who is inside and who waits: the state of a `SerialGate`, which resumes the waiters it is
/// handed.
struct WaitingLine<Waiter> {
    private var isTaken = false
    private var waiters: [Waiter] = []

    mutating func enter() -> Bool {
        defer { isTaken = true }
        return !isTaken
    }

    /// Enters, or waits to be let in. Returns whether it is inside.
    mutating func arrive(_ waiter: Waiter) -> Bool {
        if enter() { return true }
        waiters.append(waiter)
        return false
    }

    /// - Returns: who is inside now, if somebody has waited.
    mutating func leave() -> Waiter? {
        isTaken = !waiters.isEmpty
        return isTaken ? waiters.removeFirst() : nil
    }
}
