import Synchronization

/// Lets as many chunks be in flight as the window allows, which bounds the buffers.
package final class WindowGate: Sendable {
    private let queue: Mutex<WindowQueue<CheckedContinuation<Void, Never>>>
    private let meters: [CallMeter]
    private let begin = ContinuousClock.now

    /// - Parameter meters: the meters of the storages that chunks are read from and written to.
    package init(_ bounds: Window.Bounds, meters: [CallMeter]) {
        let begin = meters.reduce(CallTimes()) { $0 + $1.total }
        queue = Mutex(WindowQueue(Window(bounds, now: 0), total: begin))
        self.meters = meters
    }

    /// Waits until there is room for a chunk. Enter before the chunk is chosen, so that chunks
    /// inside never wait for one that is not.
    package func enter() async -> WindowPass {
        if let size = queue.withLock({ $0.enter() }) { return WindowPass(self, chunkSize: size) }
        await withCheckedContinuation { continuation in
            let isInside = queue.withLock { $0.arrive(continuation) }
            if isInside { continuation.resume() }
        }
        return WindowPass(self, chunkSize: queue.withLock { $0.window.chunkSize })
    }

    fileprivate func raiseBase(to count: Int) {
        for newcomer in queue.withLock({ $0.raiseBase(to: count) }) { newcomer.resume() }
    }

    fileprivate func noteRead(bytes: Int64) {
        let (total, now) = (total, now)
        for newcomer in queue.withLock({ $0.noteRead(bytes: bytes, total: total, now: now) }) {
            newcomer.resume()
        }
    }

    fileprivate func leave(bytes: Int64) {
        let (total, now) = (total, now)
        for newcomer in queue.withLock({ $0.leave(bytes: bytes, total: total, now: now) }) {
            newcomer.resume()
        }
    }

    private var total: CallTimes { meters.reduce(CallTimes()) { $0 + $1.total } }
    private var now: Int64 { Int64(begin.nanoseconds(to: .now)) }
}

/// The right to have one chunk in flight.
package struct WindowPass: ~Copyable {
    /// Length in bytes that the chunk should have.
    package let chunkSize: Int64
    private var bytes: Int64 = 0
    private let gate: WindowGate

    fileprivate init(_ gate: WindowGate, chunkSize: Int64) {
        self.gate = gate
        self.chunkSize = chunkSize
    }

    /// Notes that the chunk has to be decompressed. That takes so long that it has to go on while
    /// the writer is slow, to have enough ready when the writer is fast again.
    package func noteCompressed() { gate.raiseBase(to: 3 * IOExecutor.coreCount + 1) }

    /// Notes that the chunk is about to be written.
    ///
    /// - Parameter bytes: length of the chunk in bytes. It counts as at most `chunkSize`, because
    ///   only zeros are longer, and cost no more.
    package mutating func noteRead(bytes: Int64) {
        self.bytes = min(bytes, chunkSize)
        gate.noteRead(bytes: self.bytes)
    }

    deinit { gate.leave(bytes: bytes) }
}

/// The state of a `WindowGate`: the window, and the callers that wait. The gate resumes the waiters
/// that it gets from here.
struct WindowQueue<Waiter> {
    private(set) var window: Window
    private(set) var inside = 0
    private(set) var waiters: [Waiter] = []
    private var total: CallTimes

    /// - Parameter total: sums over all calls so far.
    init(_ window: Window, total: CallTimes = CallTimes()) {
        self.window = window
        self.total = total
    }

    /// - Returns: length in bytes that the chunk should have; nil if there is no room.
    mutating func enter() -> Int64? {
        guard inside < window.size else { return nil }
        inside += 1
        return window.chunkSize
    }

    /// Enters, or makes the waiter wait. Returns whether the caller is inside.
    mutating func arrive(_ waiter: Waiter) -> Bool {
        if enter() != nil { return true }
        waiters.append(waiter)
        return false
    }

    /// - Returns: the waiters that are inside now, too, in the order in which they came.
    mutating func raiseBase(to count: Int) -> [Waiter] {
        window.raiseBase(to: count)
        return fill()
    }

    /// - Parameter total: sums over all calls so far.
    /// - Returns: the waiters that are inside now, too.
    mutating func noteRead(bytes: Int64, total: CallTimes, now: Int64) -> [Waiter] {
        window.noteRead(bytes: bytes, times: total - self.total, now: now)
        self.total = total
        return fill()
    }

    /// - Parameter total: sums over all calls so far.
    /// - Returns: the waiters that are inside now, too.
    mutating func leave(bytes: Int64, total: CallTimes, now: Int64) -> [Waiter] {
        inside -= 1
        // A worker that found no work left had no chunk.
        if bytes > 0 {
            window.noteChunk(bytes: bytes, times: total - self.total, now: now)
            self.total = total
        }
        return fill()
    }

    private mutating func fill() -> [Waiter] {
        let count = max(0, min(window.size - inside, waiters.count))
        defer { waiters.removeFirst(count) }
        inside += count
        return Array(waiters.prefix(count))
    }
}
