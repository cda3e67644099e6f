import CLinux
import Synchronization

/// The time of calls to a storage.
public struct CallTimes: Sendable, Equatable {
    /// From begin to end, in nanoseconds; as much as `work` for a call that did not sleep.
    public var wall: Double
    /// On the processor, in nanoseconds.
    public var work: Double
    /// The number of calls, and of those that slept.
    public var calls: Double
    public var sleeps: Double

    public init(wall: Double = 0, work: Double = 0, calls: Double = 0, sleeps: Double = 0) {
        self.wall = wall
        self.work = work
        self.calls = calls
        self.sleeps = sleeps
    }

    /// One call.
    public static func call(wall: Double, work: Double, slept: Bool = true) -> CallTimes {
        CallTimes(wall: slept ? max(wall, work) : work, work: work, calls: 1, sleeps: slept ? 1 : 0)
    }

    /// Waiting is what takes the time: more of these calls at once would take no more of it.
    ///
    /// A single call that slept can be a hiccup: a file system that begins a transaction, another
    /// process that has the processor.
    public var isWaiting: Bool {
        wall > Self.manyTimes * work && wall - work > Self.noticeable && sleeps >= Self.fewCalls
            && 2 * sleeps >= calls
    }

    private static let manyTimes = 4.0
    /// Half a millisecond.
    private static let noticeable = 500_000.0
    /// Two, of which the first one counts a little less by now.
    private static let fewCalls = 1.8

    public static func + (left: CallTimes, right: CallTimes) -> CallTimes {
        CallTimes(
            wall: left.wall + right.wall, work: left.work + right.work,
            calls: left.calls + right.calls, sleeps: left.sleeps + right.sleeps)
    }

    public static func - (left: CallTimes, right: CallTimes) -> CallTimes {
        CallTimes(
            wall: left.wall - right.wall, work: left.work - right.work,
            calls: left.calls - right.calls, sleeps: left.sleeps - right.sleeps)
    }

    /// Makes a system call in this thread, and nothing beside it. Measuring leaves no trace in
    /// errno.
    package static func measure<Result>(_ call: () -> Result) -> (result: Result, times: CallTimes)
    {
        let start = ContinuousClock.now
        let before = ThreadUsage.now
        let result = call()
        let after = ThreadUsage.now
        let times = CallTimes.call(
            wall: start.nanoseconds(to: .now),
            work: Double(after.nanoseconds - before.nanoseconds),
            slept: after.sleeps != before.sleeps)
        return (result, times)
    }

    /// The times with less weight, so that later calls count more than earlier ones.
    public var faded: CallTimes {
        CallTimes(
            wall: wall * 7 / 8, work: work * 7 / 8, calls: calls * 7 / 8, sleeps: sleeps * 7 / 8)
    }
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
}

extension ContinuousClock.Instant {
    package func nanoseconds(to end: ContinuousClock.Instant) -> Double {
        let (seconds, attoseconds) = duration(to: end).components
        return Double(seconds) * 1e9 + Double(attoseconds) / 1e9
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
