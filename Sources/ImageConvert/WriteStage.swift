import DiskImage
import Synchronization

/// The third stage: places chunks in guest order and writes them.
///
/// Placing is bookkeeping in memory and has its turn wherever places are handed out, so that the same bytes come
/// out however the workers run. Writes have turns of their own when they are ordered, and happen beside each other
/// when they are not: that is all that `-W` changes. Nobody waits for a write to place the next chunk.
struct WriteStage: Sendable {
    let source: any ImageSource
    let target: any ImageTarget
    private let placing: TurnGate?
    private let writing: TurnGate?
    private let overlaps: @Sendable () -> Bool

    /// - Parameter overlaps: whether ordered writes are only begun in order, because each waits for
    ///   the storage and not for the one before it.
    init(
        source: any ImageSource, target: any ImageTarget, isOrdered: Bool,
        overlaps: @escaping @Sendable () -> Bool
    ) {
        self.overlaps = overlaps
        self.source = source
        self.target = target
        placing = target.traits.placesInOrder ? TurnGate() : nil
        writing = isOrdered ? TurnGate() : nil
    }

    /// In the chunk's turn. To be followed by `write`.
    ///
    /// - Throws: what the target throws, or `CancellationError` while waiting for a turn that will not
    ///   come because another worker failed.
    func place(
        _ pieces: [EncodedPiece], of chunk: Chunk, encoded: RawSpan
    ) async throws -> Placement {
        try await placing?.enter(chunk.sequence)
        let placement = try target.place(pieces, encoded: encoded)
        placing?.leave()
        return placement
    }

    /// - Throws: as `place`.
    func write(_ placement: Placement, of chunk: Chunk, data: RawSpan) async throws {
        guard !placement.writes.isEmpty else {
            writing?.skip(chunk.sequence)
            return
        }
        try await writing?.enter(chunk.sequence)
        let isOverlapping = overlaps()
        if isOverlapping { writing?.leave() }
        try await writeNow(placement, of: chunk, data: data)
        if !isOverlapping { writing?.leave() }
    }

    private func writeNow(
        _ placement: Placement, of chunk: Chunk, data: RawSpan
    ) async throws {
        try await target.write(
            placement, data: data, origin: BufferOrigin(source: source, start: chunk.start))
    }

    func enterTurn(of chunk: Chunk) async throws {
        try await placing?.enter(chunk.sequence)
        try await writing?.enter(chunk.sequence)
    }

    /// Not to be called after an error: the group is cancelled then, and so are those who wait.
    func leaveTurn(of chunk: Chunk) {
        placing?.leave()
        writing?.leave()
    }
}

/// Lets callers through one at a time in the order of their numbers. Each enters once, or skips its turn.
final class TurnGate: Sendable {
    private let order = Mutex(TurnOrder<CheckedContinuation<Void, any Error>>())

    /// Waits until every smaller number has left.
    func enter(_ number: Int) async throws {
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
    func leave() {
        let waiter = order.withLock { $0.advance() }
        waiter?.resume()
    }

    /// Gives up a turn without waiting for it.
    func skip(_ number: Int) {
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
    /// Larger than `turn`. While one waits for its disk there can be as many as the others find with nothing to write.
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
