import ImageStorage
import Synchronization

/// Holds workers back from fetching what nobody has the time to write.
///
/// A chunk holds a buffer from when it is fetched until it is written. Where one at a time writes, more slowly than
/// the others read, every worker would soon hold one and wait. A few are enough to keep cores and writer busy.
/// It takes more while nobody writes and a core has nothing to do, because reads wait for a disk; and all workers
/// while chunks have to be decompressed: that takes so long that it has to go on while the writer is slow, for
/// when he is fast again.
final class FetchGate: Sendable {
    private let queue: Mutex<FetchQueue<CheckedContinuation<Void, Never>>>
    private let turns: TurnGate?
    private let hasIdleCore: @Sendable () -> Bool

    /// - Parameters:
    ///   - limits: how many chunks are enough at best, and how many at worst.
    ///   - turns: in which chunks are written; nil where they are written as they come.
    init(
        limits: ClosedRange<Int>, turns: TurnGate?,
        hasIdleCore: @escaping @Sendable () -> Bool = { IOExecutor.hasIdleCore }
    ) {
        queue = Mutex(FetchQueue(limits: limits))
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
        let newcomers = queue.withLock {
            let isWriting = turns?.isOccupied ?? ($0.fetched > 0)
            return $0.passOn(
                isCompressed: isCompressed, isStarved: !isWriting && hasIdleCore())
        }
        for newcomer in newcomers { newcomer.resume() }
    }

    fileprivate func leave(isFetched: Bool) {
        for newcomer in queue.withLock({ $0.leave(isFetched: isFetched) }) { newcomer.resume() }
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
    private let limits: ClosedRange<Int>
    private var limit: Int
    private(set) var inside = 0
    /// How many of those inside have passed on their chunk to the writer.
    private(set) var fetched = 0
    private(set) var waiters: [Waiter] = []

    init(limits: ClosedRange<Int>) {
        self.limits = limits
        limit = limits.lowerBound
    }

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

    /// - Parameter isStarved: there is nothing to be written, and nothing to be done but wait for reads.
    /// - Returns: who is inside now, too, those first who waited longest.
    mutating func passOn(isCompressed: Bool, isStarved: Bool) -> [Waiter] {
        fetched += 1
        if isCompressed {
            limit = limits.upperBound
        } else if isStarved {
            limit = min(limit + 1, limits.upperBound)
        } else {
            limit = max(limit - 1, limits.lowerBound)
        }
        return fill()
    }

    /// - Returns: who is inside instead.
    mutating func leave(isFetched: Bool) -> [Waiter] {
        inside -= 1
        if isFetched { fetched -= 1 }
        return fill()
    }

    private mutating func fill() -> [Waiter] {
        let count = max(0, min(limit - inside, waiters.count))
        defer { waiters.removeFirst(count) }
        inside += count
        return Array(waiters.prefix(count))
    }
}
