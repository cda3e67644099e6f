import Synchronization

/// Lets callers through one at a time in the order of their numbers. Each enters once, or skips its
/// turn.
package final class TurnGate: Sendable {
    private let order = Mutex(TurnOrder<CheckedContinuation<Void, any Error>>())

    package init() {}

    /// Waits until every smaller number has left.
    package func enter(_ number: Int) async throws {
        if order.withLock({ $0.enter(number) }) { return try Task.checkCancellation() }
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                let action = order.withLock { $0.arrive(number, continuation) }
                switch action {
                case .enter: continuation.resume()
                case .wait: break
                case .giveUp: continuation.resume(throwing: CancellationError())
                }
            }
        } onCancel: {
            let waiter = order.withLock { $0.cancel(number) }
            waiter?.resume(throwing: CancellationError())
        }
    }

    /// Passes the turn on to the next number.
    package func leave() {
        let waiter = order.withLock { $0.advance() }
        waiter?.resume()
    }

    /// Gives up a turn without waiting for it.
    package func skip(_ number: Int) {
        let waiter = order.withLock { $0.skip(number) }
        waiter?.resume()
    }
}

/// Who may enter and who waits: the state of a `TurnGate`, which resumes the waiters it is handed.
struct TurnOrder<Waiter> {
    enum Arrival { case enter, wait, giveUp }

    private var turn = 0
    private var waiters: [Int: Waiter] = [:]
    /// Cancelled before they arrived.
    private var cancelled: Set<Int> = []
    /// Larger than `turn`. While one waits for its disk there can be as many as the others find
    /// with nothing to write.
    private var skipped: Set<Int> = []

    func enter(_ number: Int) -> Bool { number == turn }

    mutating func arrive(_ number: Int, _ waiter: Waiter) -> Arrival {
        if cancelled.remove(number) != nil { return .giveUp }
        if enter(number) { return .enter }
        waiters[number] = waiter
        return .wait
    }

    /// - Returns: who has to be told; nil if that number is not waiting (yet or any more).
    mutating func cancel(_ number: Int) -> Waiter? {
        if let waiter = waiters.removeValue(forKey: number) { return waiter }
        cancelled.insert(number)
        return nil
    }

    /// - Returns: whose turn it is now, if it waits already.
    mutating func advance() -> Waiter? {
        repeat { turn += 1 } while skipped.remove(turn) != nil
        return waiters.removeValue(forKey: turn)
    }

    /// - Returns: as `advance`.
    mutating func skip(_ number: Int) -> Waiter? {
        if number == turn { return advance() }
        skipped.insert(number)
        return nil
    }
}
