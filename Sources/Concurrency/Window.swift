import DiskImage

/// The number of chunks in flight, and their length.
///
/// If copying is the work, a few chunks keep the cores busy. If the storage waits (a network, a
/// slow server, a disk), each chunk waits for itself, so as many have to be in flight as the cores
/// could copy meanwhile. The elapsed and processor times of recent calls tell which it is. The
/// window grows at once, and then checks whether the throughput rose. If not, the storage is busy
/// and not far away: the window goes back, and waits longer before it tries again.
///
/// Pure: `WindowGate` reports the chunks and the times of the calls.
package struct Window {
    package struct Bounds {
        /// Number of chunks that is enough if copying is the work.
        package var base: Int
        /// Largest number of chunks, at least `base`.
        package var most: Int
        /// Unit of chunk lengths in bytes: each length is a multiple.
        package var unit: Int64
        /// Length of a chunk in bytes if copying is the work.
        package var shortChunk: Int64
        /// Length of a chunk in bytes if waiting takes the time: any length of a request then costs
        /// about as much.
        package var longChunk: Int64
        /// Length of a chunk in bytes if waiting takes the time and no more chunks are allowed.
        package var longestChunk: Int64
        package var cores: Int
    }

    /// Length of a chunk in bytes if waiting takes the time, whatever the length of a request.
    fileprivate static let longChunk: Int64 = 4 << 20
    /// Length of the longest chunk in bytes, for a window of few chunks.
    fileprivate static let longestChunk: Int64 = 8 << 20
    /// Largest number of chunks: more would only wait for each other.
    fileprivate static let mostChunks = 64

    private struct Dimensions {
        /// Number of chunks.
        var size: Int
        /// Length of a chunk in bytes.
        var chunkSize: Int64

        /// Number of bytes in flight when all chunks have their full length.
        var bytes: Int64 { Int64(size) * chunkSize }
    }

    private var current: Dimensions
    private let bounds: Bounds
    private var base: Int
    private var recent = Recent()
    private var trial: Trial?
    /// Time in nanoseconds from which `chunks` and `bytes` are counted at this size.
    private var start: Int64
    private var chunks = 0
    private var bytes: Int64 = 0
    private var isFirstRound = true
    /// Number of chunks that have to pass before the window may grow again.
    private var rest = 0
    private var patience = Self.patience.lowerBound
    /// Number of chunks in a row for which half the window would have been enough.
    private var calm = 0

    /// Sums over the recent chunks, in which the last one counts most.
    private struct Recent {
        var times = CallTimes()
        var bytes = 0.0
        var chunks = 0.0
    }

    private struct Trial {
        /// The window to go back to.
        var previous: Dimensions
        /// Throughput of that window in bytes per nanosecond.
        var rate: Double
        /// Whether `rate` is only an upper bound.
        var isGuess: Bool
        /// Number of chunks that were begun before the trial and do not count.
        var skipped: Int
    }

    /// Ratio of the window to the bytes that the cores could copy: the times of a few calls allow
    /// no more than a guess.
    private static let margin = 2.0
    /// Time of copying in nanoseconds per byte, assumed until it has been measured.
    private static let copying = 0.5
    /// Ratio by which the throughput has to rise for the window to stay grown.
    private static let gain = 1.2
    /// Number of windows of chunks before another attempt; doubled after each failed attempt.
    private static let patience = 32...1024
    /// Number of calm chunks after which the window shrinks.
    private static let calmness = 32

    /// - Parameter now: time in nanoseconds, from any clock that does not go back.
    init(_ bounds: Bounds, now: Int64) {
        precondition(bounds.base > 0 && bounds.base <= bounds.most)
        self.bounds = bounds
        base = bounds.base
        current = Dimensions(size: base, chunkSize: bounds.shortChunk)
        start = now
    }

    var size: Int { current.size }
    /// Length of a chunk in bytes.
    var chunkSize: Int64 { current.chunkSize }

    /// Raises the number of chunks that is enough, because chunks have to be decompressed.
    mutating func raiseBase(to count: Int) {
        base = min(max(base, count), bounds.most)
        current.size = max(size, base)
    }

    /// Notes that a chunk has been read and is still to be written. Nothing else is known before
    /// the first chunk is done, and the sooner the window grows the better.
    ///
    /// - Parameters:
    ///   - count: length of the chunk in bytes.
    ///   - times: sums over all calls since the last report.
    mutating func noteRead(bytes count: Int64, times: CallTimes, now: Int64) {
        recent.times = recent.times.faded + times
        recent.bytes = recent.bytes * 7 / 8 + Double(count)
        recent.chunks = recent.chunks * 7 / 8 + 1
        let wanted = wanted
        guard isFirstRound, chunks == 0, wanted.bytes > current.bytes * 3 / 2 else { return }
        // Writing will take about as long as reading.
        grow(to: wanted, coming: current.bytes / 2, now)
    }

    /// Notes that a chunk is done.
    ///
    /// - Parameters:
    ///   - count: length of the chunk in bytes.
    ///   - times: sums over all calls since the last report.
    mutating func noteChunk(bytes count: Int64, times: CallTimes, now: Int64) {
        recent.times = recent.times + times
        if let trial, trial.skipped > 0 {
            self.trial?.skipped -= 1
            return restart(now)
        }
        chunks += 1
        bytes += count
        rest = max(0, rest - 1)
        let wanted = wanted
        if let trial {
            if chunks >= size { end(trial, now) }
        } else if isRateKnown, rest == 0, wanted.bytes > current.bytes * 3 / 2 {
            grow(to: wanted, coming: bytes / Int64(chunks) * Int64(max(chunks, size)), now)
        } else {
            shrinkIfCalm(wanted, now)
            if chunks >= size { restart(now) }
        }
    }

    /// Whether the throughput is known. Chunks come in bursts, so their number says something only
    /// after as many as are in flight. In the first round the first chunk already gives an upper
    /// bound, as if the others came at any moment.
    private var isRateKnown: Bool { chunks >= size || isFirstRound }

    /// Less waiting is enough for a window to stay grown than to grow.
    private var isGrown: Bool { size > base || chunkSize > bounds.shortChunk }

    /// The window for as many bytes as could have been copied while the last chunks waited.
    private var wanted: Dimensions {
        let least = Dimensions(size: base, chunkSize: bounds.shortChunk)
        guard recent.bytes > 0, isGrown || recent.times.isWaiting else { return least }
        let wait = (recent.times.wall - recent.times.work) / recent.chunks
        // The first chunk can be short, which says little about copying.
        let work = isFirstRound ? Self.copying : max(1e-3, recent.times.work / recent.bytes)
        let most = Double(bounds.most) * Double(bounds.longestChunk)
        let bytes = Int64(min(most, Self.margin * wait / work * Double(bounds.cores)))
        guard bytes > least.bytes else { return least }
        let size = min(max(base, Int(bytes / bounds.longChunk) + bounds.cores), bounds.most)
        let chunkSize = min(
            max(bounds.longChunk, (bytes / Int64(size)).roundedUp(to: bounds.unit)),
            bounds.longestChunk)
        return Dimensions(size: size, chunkSize: chunkSize)
    }

    /// - Parameter coming: number of bytes that this window is about to have moved since `start`.
    private mutating func grow(to wanted: Dimensions, coming: Int64, _ now: Int64) {
        trial = Trial(
            previous: current, rate: Double(coming) / Double(max(1, now - start)),
            isGuess: isFirstRound, skipped: size)
        current = wanted
        restart(now)
    }

    private mutating func end(_ trial: Trial, _ now: Int64) {
        let rate = Double(bytes) / Double(max(1, now - start))
        if rate < trial.rate * Self.gain {
            current = trial.previous
            current.size = max(base, size)
            // A guess is no reason to rest: the next window measures, and may grow again.
            if !trial.isGuess {
                rest = patience * size
                patience = min(2 * patience, Self.patience.upperBound)
            }
        } else {
            patience = Self.patience.lowerBound
        }
        self.trial = nil
        restart(now)
    }

    private mutating func shrinkIfCalm(_ wanted: Dimensions, _ now: Int64) {
        calm = wanted.bytes < current.bytes / 2 ? calm + 1 : 0
        guard calm >= Self.calmness else { return }
        current = wanted
        calm = 0
        restart(now)
    }

    private mutating func restart(_ now: Int64) {
        isFirstRound = false
        start = now
        chunks = 0
        bytes = 0
    }
}

extension Window.Bounds {
    /// Allows as much at once as fits into the given memory.
    ///
    /// - Parameters:
    ///   - base: number of chunks that is enough if copying is the work.
    ///   - limit: largest number of chunks; nil if only the memory limits it.
    ///   - memory: number of bytes for all chunks together.
    ///   - unit: unit of chunk lengths in bytes.
    ///   - shortChunk: length of a chunk in bytes if copying is the work.
    package init(base: Int, limit: Int?, memory: Int64, unit: Int64, shortChunk: Int64) {
        let limit = min(limit ?? .max, Window.mostChunks)
        self.base = max(1, min(base, limit, Int(memory / shortChunk)))
        self.unit = unit
        self.shortChunk = shortChunk
        longChunk = max(
            shortChunk, min(Window.longChunk, memory / Int64(self.base)).roundedDown(to: unit))
        most = max(self.base, min(limit, Int(memory / longChunk)))
        longestChunk = max(
            longChunk, min(Window.longestChunk, memory / Int64(most)).roundedDown(to: unit))
        cores = IOExecutor.coreCount
    }
}
