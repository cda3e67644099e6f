import ImageStorage
import Synchronization

/// Holds workers back from fetching what nobody has the time to write.
///
/// A chunk holds a buffer from when it is fetched until it is written. Where one at a time writes, more slowly than
/// the others read, every worker would soon hold one and wait. A few are enough to keep cores and writer busy.
/// One more is let in when a core has nothing to do although nobody writes, because reads wait for a disk, or although
/// there is something to decompress, because the writer is stuck.
final class FetchGate: Sendable {
    private let queue: Mutex<FetchQueue<CheckedContinuation<Void, Never>>>
    private let turns: TurnGate?
    private let hasIdleCore: @Sendable () -> Bool

    /// - Parameters:
    ///   - limit: how many chunks are enough.
    ///   - turns: in which chunks are written; nil where they are written as they come.
    init(
        limit: Int, turns: TurnGate?,
        hasIdleCore: @escaping @Sendable () -> Bool = { IOExecutor.hasIdleCore }
    ) {
        queue = Mutex(FetchQueue(limit: limit))
        self.turns = turns
        self.hasIdleCore = hasIdleCore
    }

    /// How many chunks there are, how many of them are fetched, and how many more there might be.
    var counts: (inside: Int, fetched: Int, waiting: Int) {
        queue.withLock { ($0.inside, $0.fetched, $0.waiters.count) }
    }

    /// Waits until there is room for a chunk. To be entered before the chunk is known: those inside never wait
    /// for one that is not.
    func enter() async -> FetchPass {
        if !queue.withLock({ $0.enter() }) {
            await withCheckedContinuation { continuation in
                let isInside = queue.withLock { $0.arrive(continuation) }
                if isInside { continuation.resume() }
            }
        }
        return FetchPass(gate: self)
    }

    fileprivate func passOn(isCompressed: Bool) {
        let (isWaitedFor, isWriting) = queue.withLock {
            $0.passOn()
            return (!$0.waiters.isEmpty, turns?.isOccupied ?? ($0.fetched > 1))
        }
        guard isWaitedFor, isCompressed || !isWriting, hasIdleCore() else { return }
        queue.withLock { $0.letOneIn() }?.resume()
    }

    fileprivate func leave(isFetched: Bool) {
        queue.withLock { $0.leave(isFetched: isFetched) }?.resume()
    }
}

/// The right to fetch one chunk and to keep it until it is written.
struct FetchPass: ~Copyable {
    private let gate: FetchGate
    private var isFetched = false

    fileprivate init(gate: FetchGate) { self.gate = gate }

    /// The chunk is fetched, and waits for the writer only.
    ///
    /// - Parameter isCompressed: it was, or a part of it.
    mutating func passOn(isCompressed: Bool) {
        isFetched = true
        gate.passOn(isCompressed: isCompressed)
    }

    deinit { gate.leave(isFetched: isFetched) }
}

/// Who fetches and who waits: the state of a `FetchGate`, which resumes the waiters it is handed.
struct FetchQueue<Waiter> {
    private let limit: Int
    private(set) var inside = 0
    /// How many of those inside have passed on their chunk to the writer.
    private(set) var fetched = 0
    private(set) var waiters: [Waiter] = []

    init(limit: Int) { self.limit = limit }

    /// - Returns: whether there was room.
    mutating func enter() -> Bool {
        guard inside < limit else { return false }
        inside += 1
        return true
    }

    /// Enters, or waits to be let in. Returns whether it is inside.
    mutating func arrive(_ waiter: Waiter) -> Bool {
        if enter() { return true }
        waiters.append(waiter)
        return false
    }

    mutating func passOn() { fetched += 1 }

    /// Whatever the limit is.
    ///
    /// - Returns: who waited longest, and is inside now.
    mutating func letOneIn() -> Waiter? {
        guard !waiters.isEmpty else { return nil }
        inside += 1
        return waiters.removeFirst()
    }

    /// - Returns: who is inside instead.
    mutating func leave(isFetched: Bool) -> Waiter? {
        inside -= 1
        if isFetched { fetched -= 1 }
        return inside < limit ? letOneIn() : nil
    }
}
