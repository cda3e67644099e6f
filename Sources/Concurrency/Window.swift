import DiskImage

/// The number of chunks on their way, and their length.
///
/// Where copying is the work, a few keep the cores busy. Where the storage waits (a network, a slow
/// server, a disk), each chunk waits for itself, so there have to be as many as the cores could
/// copy meanwhile. What the calls of the last chunks took beside what they worked tells which it
/// is. The window grows at once, and then looks whether more came through. If not, the storage is
/// busy and not far away: the window goes back, and waits longer before it tries again.
///
/// Pure: `WindowGate` tells it what the chunks took.
package struct Window {
    package struct Bounds {
        /// The number of chunks that is enough where copying is the work.
        package var base: Int
        /// The largest number of chunks, at least `base`.
        package var most: Int
        /// Lengths of chunks are multiples of this, in bytes.
        package var unit: Int64
        /// The length of a chunk where copying is the work, in bytes.
        package var shortChunk: Int64
        /// The length where waiting is what takes the time, in bytes: a request costs the same,
        /// however long.
        package var longChunk: Int64
        /// The length where waiting takes the time and no more chunks are allowed, in bytes.
        package var longestChunk: Int64
        package var cores: Int

        package init(
            base: Int, most: Int, unit: Int64, shortChunk: Int64, longChunk: Int64,
            longestChunk: Int64, cores: Int
        ) {
            self.base = base
            self.most = most
            self.unit = unit
            self.shortChunk = shortChunk
            self.longChunk = longChunk
            self.longestChunk = longestChunk
            self.cores = cores
        }
    }

    /// Where waiting is what takes the time, a request costs the same, however long, in bytes.
    fileprivate static let longChunk: Int64 = 2 << 20
    /// The longest chunk where few chunks are allowed, in bytes.
    fileprivate static let longestChunk: Int64 = 8 << 20
    /// More wait for nothing but each other.
    fileprivate static let mostChunks = 64

    private(set) var size: Int
    /// The length of a chunk, in bytes.
    private(set) var chunkSize: Int64

    private let bounds: Bounds
    private var base: Int
    private var recent = Recent()
    private var trial: Trial?
    /// Since when bytes are counted at this size, in nanoseconds, and what has come since then.
    private var start: Int64
    private var chunks = 0
    private var bytes: Int64 = 0
    private var isFirstRound = true
    /// The number of chunks that have to pass before the window may grow again.
    private var rest = 0
    private var patience = Self.patience.lowerBound
    /// The number of chunks in a row for which half the window would have been enough.
    private var calm = 0

    /// Sums over the last chunks, the very last one counting most.
    private struct Recent {
        var times = CallTimes()
        var bytes = 0.0
        var chunks = 0.0
    }

    private struct Trial {
        /// The window to go back to.
        var size: Int
        var chunkSize: Int64
        /// The throughput of that window, in bytes per nanosecond.
        var rate: Double
        /// The number of chunks that were begun before and are not counted.
        var skipped: Int
    }

    /// The window holds this many times the bytes that the cores could copy: the times of a few
    /// calls allow no more than a guess.
    private static let margin = 2.0
    /// The time of copying that is assumed until it has been measured, in nanoseconds a byte.
    private static let copying = 0.5
    /// The throughput of a window that has grown has to be this many times the one before.
    private static let gain = 1.2
    /// The number of windows of chunks before another attempt; twice as many after each one in
    /// vain.
    private static let patience = 32...1024
    /// After how many chunks the window shrinks.
    private static let calmness = 32

    /// - Parameter now: in nanoseconds, of any clock that does not go back.
    init(_ bounds: Bounds, now: Int64) {
        precondition(bounds.base > 0 && bounds.base <= bounds.most)
        self.bounds = bounds
        base = bounds.base
        size = base
        chunkSize = bounds.shortChunk
        start = now
    }

    /// More are enough from now on: chunks have to be decompressed.
    mutating func raiseBase(to count: Int) {
        base = min(max(base, count), bounds.most)
        size = max(size, base)
    }

    /// A chunk has been read, and is still to be written. Before the first chunk is done this is
    /// all that is known, and the sooner the window grows the better.
    ///
    /// - Parameters:
    ///   - count: how long the chunk is, in bytes.
    ///   - times: of all calls since the last time.
    mutating func noteRead(bytes count: Int64, times: CallTimes, now: Int64) {
        recent.times = recent.times.faded + times
        recent.bytes = recent.bytes * 7 / 8 + Double(count)
        recent.chunks = recent.chunks * 7 / 8 + 1
        let wanted = wanted
        guard isFirstRound, chunks == 0, wanted.bytes > inFlight + inFlight / 2 else { return }
        // Writing will take about as long again.
        grow(to: wanted, coming: inFlight / 2, now)
    }

    /// A chunk is done.
    ///
    /// - Parameters:
    ///   - count: how long it was, in bytes.
    ///   - times: of all calls since the last time.
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
        } else if isRateKnown, rest == 0, wanted.bytes > inFlight + inFlight / 2 {
            grow(to: wanted, coming: bytes / Int64(chunks) * Int64(max(chunks, size)), now)
        } else {
            shrinkIfCalm(wanted, now)
            if chunks >= size { restart(now) }
        }
    }

    /// Chunks come in bursts: their number over time says something only after as many as are in
    /// flight. From the very first one on there is an upper bound, if the others come at any
    /// moment.
    private var isRateKnown: Bool { chunks >= size || isFirstRound }

    /// The bytes on their way when all chunks are as long as they may be.
    private var inFlight: Int64 { Int64(size) * chunkSize }

    /// In long chunks there is more work beside the same waiting: what made the window grow does
    /// not have to be so striking for it to stay.
    private var isWide: Bool { chunkSize > bounds.shortChunk }

    /// By what the last chunks waited for: as many bytes as could have been copied meanwhile.
    private var wanted: (bytes: Int64, size: Int, chunkSize: Int64) {
        let least = (
            bytes: Int64(base) * bounds.shortChunk, size: base, chunkSize: bounds.shortChunk
        )
        guard recent.bytes > 0, isWide || recent.times.isWaiting else { return least }
        let wait = (recent.times.wall - recent.times.work) / recent.chunks
        // The first chunk can be a short one, which says little about copying.
        let work = isFirstRound ? Self.copying : max(1e-3, recent.times.work / recent.bytes)
        let most = Double(bounds.most) * Double(bounds.longestChunk)
        let bytes = Int64(min(most, Self.margin * wait / work * Double(bounds.cores)))
        guard bytes > least.bytes else { return least }
        let size = min(max(base, Int(bytes / bounds.longChunk) + bounds.cores), bounds.most)
        let chunkSize = min(
            max(bounds.longChunk, (bytes / Int64(size)).roundedUp(to: bounds.unit)),
            bounds.longestChunk)
        return (Int64(size) * chunkSize, size, chunkSize)
    }

    /// - Parameter coming: the bytes that this window is about to have moved since `start`.
    private mutating func grow(
        to wanted: (bytes: Int64, size: Int, chunkSize: Int64), coming: Int64, _ now: Int64
    ) {
        trial = Trial(
            size: size, chunkSize: chunkSize, rate: Double(coming) / Double(max(1, now - start)),
            skipped: size)
        (size, chunkSize) = (wanted.size, wanted.chunkSize)
        restart(now)
    }

    private mutating func end(_ trial: Trial, _ now: Int64) {
        let rate = Double(bytes) / Double(max(1, now - start))
        if rate < trial.rate * Self.gain {
            (size, chunkSize) = (max(base, trial.size), trial.chunkSize)
            rest = patience * size
            patience = min(2 * patience, Self.patience.upperBound)
        } else {
            patience = Self.patience.lowerBound
        }
        self.trial = nil
        restart(now)
    }

    private mutating func shrinkIfCalm(
        _ wanted: (bytes: Int64, size: Int, chunkSize: Int64), _ now: Int64
    ) {
        calm = wanted.bytes < inFlight / 2 ? calm + 1 : 0
        guard calm >= Self.calmness else { return }
        size = wanted.size
        chunkSize = wanted.chunkSize
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
    /// As much at once as fits into the memory for it.
    ///
    /// - Parameters:
    ///   - base: the number of chunks that is enough where copying is the work.
    ///   - limit: the largest number of chunks; nil for no other limit than the memory.
    ///   - memory: for all chunks together, in bytes.
    ///   - unit: lengths of chunks are multiples of this, in bytes.
    ///   - shortChunk: the length of a chunk where copying is the work, in bytes.
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
