import CLinux
import Synchronization

/// The time of calls to a storage, in nanoseconds.
public struct CallTimes: Sendable, Equatable {
    /// From begin to end; as much as `work` for a call that did not sleep.
    public var wall: Int64
    /// On the processor.
    public var work: Int64

    public init(wall: Int64 = 0, work: Int64 = 0) {
        self.wall = wall
        self.work = work
    }

    /// Waiting is what takes the time: more of these calls at once would take no more of it.
    public var isWaiting: Bool { wall > Self.manyTimes * work && wall - work > Self.noticeable }

    private static let manyTimes: Int64 = 4
    /// Half a millisecond: below it, another thread may have had the processor.
    private static let noticeable: Int64 = 500_000

    public static func + (left: CallTimes, right: CallTimes) -> CallTimes {
        CallTimes(wall: left.wall + right.wall, work: left.work + right.work)
    }

    public static func - (left: CallTimes, right: CallTimes) -> CallTimes {
        CallTimes(wall: left.wall - right.wall, work: left.work - right.work)
    }

    /// The times with less weight, so that later calls count more than earlier ones.
    public var faded: CallTimes { CallTimes(wall: wall * 7 / 8, work: work * 7 / 8) }
}

/// Measures the calls that move data to or from a storage: whether they wait or work.
public final class CallMeter: Sendable {
    private let sums = Mutex<(all: CallTimes, recent: CallTimes)>((CallTimes(), CallTimes()))

    public init() {}

    /// The times of all calls so far.
    public var total: CallTimes { sums.withLock { $0.all } }

    /// Whether the last calls waited.
    public var isWaiting: Bool { sums.withLock { $0.recent.isWaiting } }

    public func note(_ times: CallTimes) {
        sums.withLock {
            $0.all = $0.all + times
            $0.recent = $0.recent.faded + times
        }
    }

    /// Makes a call in this thread.
    @discardableResult
    func measure<Result, Failure: Error>(
        _ call: () throws(Failure) -> Result
    ) throws(Failure) -> Result {
        try timed(call).result
    }

    func timed<Result, Failure: Error>(
        _ call: () throws(Failure) -> Result
    ) throws(Failure) -> (result: Result, times: CallTimes) {
        let start = ContinuousClock.now
        let before = ThreadUsage.now
        let result = try call()
        let after = ThreadUsage.now
        let work = after.nanoseconds - before.nanoseconds
        let wall = after.sleeps == before.sleeps ? work : start.nanoseconds(to: .now)
        let times = CallTimes(wall: max(wall, work), work: work)
        note(times)
        return (result, times)
    }
}

extension ContinuousClock.Instant {
    public func nanoseconds(to end: ContinuousClock.Instant) -> Int64 {
        let (seconds, attoseconds) = duration(to: end).components
        return seconds * 1_000_000_000 + attoseconds / 1_000_000_000
    }
}

private struct ThreadUsage {
    var nanoseconds: Int64 = 0
    var sleeps: Int64 = 0

    static var now: ThreadUsage {
        var usage = ThreadUsage()
        clinux_thread_usage(&usage.nanoseconds, &usage.sleeps)
        return usage
    }
}
