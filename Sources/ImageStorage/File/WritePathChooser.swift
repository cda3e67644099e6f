/// Decides whether writes to a file go through the page cache or past it: by what either takes at the moment.
///
/// The page cache is the faster way where the kernel has pages at hand. Where it has none, because a virtual machine gave its
/// free memory back to the host or a disk has to be waited for anyway, a direct write takes less time and no memory.
/// Nothing tells beforehand which it is, and it changes within seconds: so both ways are timed, the one that is in use all the time
/// and the other one now and then.
///
/// Pure: whoever writes tells what it took.
struct WritePathChooser {
    /// How much is written before a rate is worth something, in bytes.
    private static let period = 16 << 20
    /// Nothing is tried beside a page cache that is as fast as this, in bytes per nanosecond.
    private static let fastEnough = 2.0
    /// How many times as fast another way has to be.
    private static let advantage = 1.25
    /// After how many periods the other way is tried again; twice as many after each trial in vain.
    private static let patience = 16...256

    /// The way to go now.
    private(set) var isDirect: Bool
    /// The way that is gone when nothing is being tried.
    private var usual: Bool
    /// In bytes per nanosecond.
    private var usualRate = 0.0
    /// The same when the other way was tried last.
    private var rateAtTrial = 0.0
    private var bytes = 0
    private var nanoseconds: Int64 = 0
    private var patience = Self.patience.lowerBound
    private var periodsUntilTrial = 0
    private var isSettled = false

    /// - Parameter isDirect: which way to begin with.
    init(isDirect: Bool = false) {
        self.isDirect = isDirect
        usual = isDirect
    }

    private var isTrial: Bool { isDirect != usual }

    /// - Parameter time: that it took to write them, in nanoseconds.
    mutating func note(bytes count: Int, time: Int64) {
        guard !isSettled else { return }
        bytes += count
        nanoseconds += time
        // A slow disk must not be waited for longer than it takes to see that it is slow.
        let isHopeless = isTrial && Double(nanoseconds) * usualRate > 2 * Double(Self.period)
        guard isHopeless || bytes >= Self.period else { return }
        let rate = Double(bytes) / Double(max(nanoseconds, 1))
        bytes = 0
        nanoseconds = 0
        if isTrial { endTrial(rate) } else { endPeriod(rate) }
    }

    /// Direct writes do not work here.
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
