import CLinux
import Synchronization

/// Sums over calls to a storage.
public struct CallTimes: Sendable, Equatable {
    /// Elapsed time in nanoseconds; equals `work` for a call that did not sleep.
    public var wall: Double
    /// Processor time in nanoseconds.
    public var work: Double
    /// Number of calls; `sleeps` is the number of those that slept.
    public var calls: Double
    public var sleeps: Double
    /// Elapsed time in nanoseconds from which the calls count as waiting.
    public var patience: Double

    public init(
        wall: Double = 0, work: Double = 0, calls: Double = 0, sleeps: Double = 0,
        patience: Double? = nil
    ) {
        self.wall = wall
        self.work = work
        self.calls = calls
        self.sleeps = sleeps
        self.patience = patience ?? Self.manyTimes * work
    }

    /// These times, which count as waiting from another ratio of elapsed to processor time on.
    public func waiting(from manyTimes: Double) -> CallTimes {
        CallTimes(
            wall: wall, work: work, calls: calls, sleeps: sleeps, patience: manyTimes * work)
    }

    /// The times of a single call.
    public static func call(wall: Double, work: Double, slept: Bool = true) -> CallTimes {
        CallTimes(wall: slept ? max(wall, work) : work, work: work, calls: 1, sleeps: slept ? 1 : 0)
    }

    /// Whether the time goes to waiting: more of these calls at once would take no longer.
    ///
    /// A single call that slept is not enough. It can be a hiccup: a file system that begins a
    /// transaction, or another process that has the processor. Where reads sleep and writes do not,
    /// or the other way round, about half of the calls sleep.
    public var isWaiting: Bool {
        wall > patience && wall - work > Self.noticeable && sleeps >= Self.fewCalls
            && 4 * sleeps >= calls
    }

    /// Ratio of elapsed to processor time from which calls count as waiting, if they may also wait
    /// for each other.
    public static let manyTimes = 4.0
    /// Ratio from which calls count as waiting that only the storage keeps waiting.
    public static let manyTimesAlone = 2.0
    /// Half a millisecond, in nanoseconds.
    private static let noticeable = 500_000.0
    /// Two calls, the first of which `faded` has already reduced to 7/8.
    private static let fewCalls = 1.8

    public static func + (left: CallTimes, right: CallTimes) -> CallTimes {
        CallTimes(
            wall: left.wall + right.wall, work: left.work + right.work,
            calls: left.calls + right.calls, sleeps: left.sleeps + right.sleeps,
            patience: left.patience + right.patience)
    }

    public static func - (left: CallTimes, right: CallTimes) -> CallTimes {
        CallTimes(
            wall: left.wall - right.wall, work: left.work - right.work,
            calls: left.calls - right.calls, sleeps: left.sleeps - right.sleeps,
            patience: left.patience - right.patience)
    }

    /// Measures a closure that makes one system call in this thread and does nothing else. `errno`
    /// stays as the call left it.
    package static func measure<Result>(_ call: () -> Result) -> (result: Result, times: CallTimes)
    {
        let start = ContinuousClock.now
        let before = threadUsage()
        let result = call()
        let after = threadUsage()
        let times = CallTimes.call(
            wall: start.nanoseconds(to: .now),
            work: Double(after.nanoseconds - before.nanoseconds),
            slept: after.sleeps != before.sleeps)
        return (result, times)
    }

    /// These sums with 7/8 of their weight, so that later calls count more than earlier ones.
    public var faded: CallTimes {
        CallTimes(
            wall: wall * 7 / 8, work: work * 7 / 8, calls: calls * 7 / 8, sleeps: sleeps * 7 / 8,
            patience: patience * 7 / 8)
    }
}

/// Adds up the calls that move data to or from a storage, and tells whether they wait or work.
public final class CallMeter: Sendable {
    private let sums = Mutex<(all: CallTimes, recent: CallTimes)>((CallTimes(), CallTimes()))
    private let manyTimes: Double

    /// - Parameter manyTimes: ratio of elapsed to processor time from which calls count as waiting.
    public init(manyTimes: Double = CallTimes.manyTimes) { self.manyTimes = manyTimes }

    /// The times of all calls so far.
    public var total: CallTimes { sums.withLock { $0.all } }

    /// Whether the most recent calls waited.
    public var isWaiting: Bool { sums.withLock { $0.recent.isWaiting } }

    public func note(_ times: CallTimes) {
        let times = times.waiting(from: manyTimes)
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

private func threadUsage() -> (nanoseconds: Int64, sleeps: Int64) {
    var usage: (nanoseconds: Int64, sleeps: Int64) = (0, 0)
    clinux_thread_usage(&usage.nanoseconds, &usage.sleeps)
    return usage
}
