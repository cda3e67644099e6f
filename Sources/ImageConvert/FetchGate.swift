import ImageStorage
import Synchronization

/// Holds workers back from fetching what nobody has the time to write, or to compress.
///
/// A chunk holds a buffer from when it is fetched until it is written. Where one at a time writes, more slowly than
/// the others read, every worker would soon hold one and wait. A few are enough to keep cores and writer busy.
/// It takes more while nobody writes and a core has nothing to do, because reads wait for a disk; and three for each
/// core and one while chunks have to be decompressed: that takes so long that it has to go on while the writer is slow, to
/// have enough ready when it is fast again.
final class FetchGate: Sendable {
    private let queue: Mutex<FetchQueue<CheckedContinuation<Void, Never>>>
    private let isFixed: Bool
    private let isWriting: @Sendable () -> Bool
    private let hasIdleCore: @Sendable () -> Bool

    /// - Parameters:
    ///   - limits: how many chunks are enough where writing takes longest, and how many there may ever be.
    ///   - isWriting: whether the target is being written to at the moment.
    init(
        limits: ClosedRange<Int>, isWriting: @escaping @Sendable () -> Bool,
        hasIdleCore: @escaping @Sendable () -> Bool = { IOExecutor.hasIdleCore }
    ) {
        queue = Mutex(FetchQueue(limits: limits, decompressing: 3 * IOExecutor.coreCount + 1))
        isFixed = limits.count == 1
        self.isWriting = isWriting
        self.hasIdleCore = hasIdleCore
    }

    /// How many chunks there are, how many of them are fetched, and how many workers wait.
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
        let writer: FetchQueue<CheckedContinuation<Void, Never>>.Writer =
            if isFixed || isWriting() { .busy } else { hasIdleCore() ? .starved : .idle }
        let newcomers = queue.withLock { $0.passOn(isCompressed: isCompressed, writer: writer) }
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
    /// What a chunk finds that has been fetched.
    enum Writer {
        /// At work.
        case busy
        /// Without work, while the cores have some.
        case idle
        /// Without work, and so is a core.
        case starved
    }

    private let limits: ClosedRange<Int>
    /// How many are enough while chunks are decompressed.
    private let decompressing: Int
    /// In halves of a chunk: it falls more slowly than it rises.
    private var halves: Int
    private(set) var inside = 0
    /// How many of those inside have passed on their chunk to the writer.
    private(set) var fetched = 0
    private(set) var waiters: [Waiter] = []

    init(limits: ClosedRange<Int>, decompressing: Int) {
        self.limits = limits
        self.decompressing = min(max(decompressing, limits.lowerBound), limits.upperBound)
        halves = 2 * limits.lowerBound
    }

    private var limit: Int { halves / 2 }

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

    /// - Returns: who is inside now, too, those first who waited longest.
    mutating func passOn(isCompressed: Bool, writer: Writer) -> [Waiter] {
        // Two others that wait for the writer are more than it needs; one that waits for its turn is not missed.
        let change =
            switch writer {
            case .busy: fetched > 2 ? -1 : 0
            case .idle: -1
            case .starved: fetched > 0 ? 0 : 2
            }
        halves = min(max(halves + change, 2 * limits.lowerBound), 2 * limits.upperBound)
        if isCompressed { halves = max(halves, 2 * decompressing) }
        fetched += 1
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
