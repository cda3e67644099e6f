/// Decides whether writes to a file go through the page cache or bypass it, by the current speed of
/// both.
///
/// The page cache is faster if the kernel has pages at hand. If it has none, because a virtual
/// machine gave its free memory back to the host or a disk has to be waited for anyway, a direct
/// write takes less time and no memory. Nothing tells beforehand which it is, and it changes within
/// seconds. So both ways are timed: the current one all the time, the other one now and then.
///
/// Pure: the writer reports the times.
struct WritePathChooser {
    /// Number of bytes written before a rate is trusted.
    private static let period = 16 << 20
    /// Rate of the page cache, in bytes per nanosecond, from which on nothing else is tried.
    private static let fastEnough = 2.0
    /// Ratio by which the other way has to be faster.
    private static let advantage = 1.25
    /// Number of periods before the other way is tried again; doubled after each failed trial.
    private static let patience = 16...256

    /// Whether to write directly now.
    private(set) var isDirect: Bool
    /// Whether to write directly when nothing is being tried.
    private var usual: Bool
    /// Rate of the usual way in bytes per nanosecond.
    private var usualRate = 0.0
    /// Rate of the usual way when the other one was last tried.
    private var rateAtTrial = 0.0
    private var bytes = 0
    private var nanoseconds: Int64 = 0
    private var patience = Self.patience.lowerBound
    private var periodsUntilTrial = 0
    private var isSettled = false

    /// - Parameter isDirect: whether to begin with direct writes.
    init(isDirect: Bool = false) {
        self.isDirect = isDirect
        usual = isDirect
    }

    private var isTrial: Bool { isDirect != usual }

    /// - Parameter time: duration of the writes in nanoseconds.
    mutating func note(bytes count: Int, time: Int64) {
        guard !isSettled else { return }
        bytes += count
        nanoseconds += time
        // A trial ends early once it took twice the time of the usual way.
        let isHopeless = isTrial && Double(nanoseconds) * usualRate > 2 * Double(Self.period)
        guard isHopeless || bytes >= Self.period else { return }
        let rate = Double(bytes) / Double(max(nanoseconds, 1))
        bytes = 0
        nanoseconds = 0
        if isTrial { endTrial(rate) } else { endPeriod(rate) }
    }

    /// Uses the page cache from now on, because direct writes do not work here.
    mutating func settleForCache() {
        isSettled = true
        isDirect = false
    }

    private mutating func endTrial(_ rate: Double) {
        if rate > usualRate * Self.advantage {
            usual = isDirect
            usualRate = rate
            patience = Self.patience.lowerBound
        } else {
            isDirect = usual
            patience = min(2 * patience, Self.patience.upperBound)
        }
        periodsUntilTrial = patience
        rateAtTrial = usualRate
    }

    private mutating func endPeriod(_ rate: Double) {
        usualRate = rate
        periodsUntilTrial = max(0, periodsUntilTrial - 1)
        if rate * 2 < rateAtTrial {
            patience = Self.patience.lowerBound
            periodsUntilTrial = 0
        }
        guard periodsUntilTrial == 0, isDirect || rate < Self.fastEnough else { return }
        isDirect.toggle()
    }
}
