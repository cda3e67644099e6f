import Concurrency

/// Whether writes to a file are made one by one, joined, or beside each other.
///
/// A file system lets one writer at a time into a file. Where copying into the page cache is what
/// takes the time, several would only wait for each other; where each write waits for its storage,
/// one by one is the worst there is. What a lone writer's calls take tells which it is. Beside each
/// other they wait for the lock too, so then one writer is let in alone now and then, to see.
///
/// Pure: `WriteJoiner` tells it what the writes took.
struct WriterMode {
    private(set) var isParallel = false
    /// The times of the last lone writes.
    private var recent = CallTimes()
    private var patience = Self.patience.lowerBound
    private var writesUntilTrial = 0
    private var loneWrites = 0

    /// The number of writes until a lone one is tried; twice as many after each trial in vain.
    private static let patience = 128...4096

    /// A write was made while there was no other.
    mutating func noteLone(_ times: CallTimes) {
        recent = recent.faded + times
        loneWrites += 1
        if recent.isWaiting {
            isParallel = true
            writesUntilTrial = patience
            patience = min(2 * patience, Self.patience.upperBound)
            recent = CallTimes()
            loneWrites = 0
        } else if loneWrites > Self.patience.lowerBound {
            patience = Self.patience.lowerBound
        }
    }

    /// A write was begun beside others.
    mutating func noteParallel() {
        writesUntilTrial -= 1
        if writesUntilTrial <= 0 { isParallel = false }
    }
}
