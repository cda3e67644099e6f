import Synchronization

/// Lets callers through one at a time, in the order of their numbers. Each number enters once, or
/// skips its turn.
package final class TurnGate: Sendable {
    private let order = Mutex(TurnOrder<CheckedContinuation<Void, any Error>>())

    package init() {}

    /// Waits until every smaller number has left or skipped its turn.
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
        order.withLock { $0.advance() }?.resume()
    }

    /// Gives up a turn without waiting for it.
    package func skip(_ number: Int) {
        order.withLock { $0.skip(number) }?.resume()
    }
}

/// The state of a `TurnGate`, which resumes the waiters that it gets from here.
struct TurnOrder<Waiter> {
    enum Arrival { case enter, wait, giveUp }

    private var turn = 0
    private var waiters: [Int: Waiter] = [:]
    /// Numbers that were cancelled before they arrived.
    private var cancelled: Set<Int> = []
    /// Skipped numbers larger than `turn`. While one caller waits for its disk, there can be as
    /// many as the other callers find with nothing to write.
    private var skipped: Set<Int> = []

    func enter(_ number: Int) -> Bool { number == turn }

    mutating func arrive(_ number: Int, _ waiter: Waiter) -> Arrival {
        if cancelled.remove(number) != nil { return .giveUp }
        if enter(number) { return .enter }
        waiters[number] = waiter
        return .wait
    }

    /// - Returns: the waiter to resume; nil if the number does not wait (yet, or any more).
    mutating func cancel(_ number: Int) -> Waiter? {
        if let waiter = waiters.removeValue(forKey: number) { return waiter }
        cancelled.insert(number)
        return nil
    }

    /// - Returns: the waiter whose turn it is now; nil if it has not arrived.
    mutating func advance() -> Waiter? {
        repeat { turn += 1 } while skipped.remove(turn) != nil
        return waiters.removeValue(forKey: turn)
    }

    /// - Returns: as for `advance`.
    mutating func skip(_ number: Int) -> Waiter? {
        if number == turn { return advance() }
        skipped.insert(number)
        return nil
    }
}
