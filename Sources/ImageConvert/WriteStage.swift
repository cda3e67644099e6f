import DiskImage
import Synchronization

/// The third stage: places chunks in guest order and writes them.
///
/// Placing is bookkeeping in memory and always has its turn, so that the same bytes come out however
/// the workers run. The writing that follows is part of the turn when writes are ordered, and happens
/// beside those of other workers when they are not: that is all that `-W` changes.
struct WriteStage: Sendable {
    let source: any ImageSource
    let target: any ImageTarget
    let isOrdered: Bool
    private let gate = TurnGate()

    init(source: any ImageSource, target: any ImageTarget, isOrdered: Bool) {
        self.source = source
        self.target = target
        self.isOrdered = isOrdered
    }

    private var hasTurns: Bool { isOrdered || target.traits.placesInOrder }

    /// - Throws: what the target throws, or `CancellationError` while waiting for a turn that will not
    ///   come because another worker failed.
    func write(
        _ pieces: [EncodedPiece], of chunk: Chunk, data: RawSpan, encoded: RawSpan
    ) async throws {
        try await enterTurn(of: chunk)
        let placement = try target.place(pieces)
        if !isOrdered { leaveTurn(of: chunk) }
        try await write(placement, of: chunk, data: data, encoded: encoded)
        if isOrdered { leaveTurn(of: chunk) }
    }

    /// Places and writes a part of a chunk within the chunk's turn.
    func writeNow(
        _ pieces: [EncodedPiece], of part: Chunk, data: RawSpan, encoded: RawSpan
    ) async throws {
        let placement = try target.place(pieces)
        try await write(placement, of: part, data: data, encoded: encoded)
    }

    private func write(
        _ placement: Placement, of chunk: Chunk, data: RawSpan, encoded: RawSpan
    ) async throws {
        try await target.write(
            placement, data: data, encoded: encoded,
            origin: BufferOrigin(source: source, start: chunk.start))
    }

    func enterTurn(of chunk: Chunk) async throws {
        if hasTurns { try await gate.enter(chunk.sequence) }
    }

    /// Not to be called after an error: the group is cancelled then, and so are those who wait.
    func leaveTurn(of chunk: Chunk) {
        if hasTurns { gate.leave() }
    }
}

/// Lets callers through one at a time in the order of their numbers.
final class TurnGate: Sendable {
    private let order = Mutex(TurnOrder<CheckedContinuation<Void, any Error>>())

    /// Waits until every smaller number has left. Each number enters once.
    func enter(_ number: Int) async throws {
        if order.withLock({ $0.isTurn(of: number) }) { return try Task.checkCancellation() }
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
    func leave() {
        let waiter = order.withLock { $0.advance() }
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

    func isTurn(of number: Int) -> Bool { number == turn }

    mutating func arrive(_ number: Int, _ waiter: Waiter) -> Arrival {
        if cancelled.remove(number) != nil { return .giveUp }
        if number == turn { return .enter }
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
        turn += 1
        return waiters.removeValue(forKey: turn)
    }
}
