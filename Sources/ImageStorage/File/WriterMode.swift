import Concurrency

/// Decides whether writes to a file are joined and made one by one, or made concurrently.
///
/// A file system lets one writer at a time into a file. If copying into the page cache takes the
/// time, several writers would only wait for each other; if each write waits for its storage, one
/// by one is the slowest way. The times of a lone writer's calls tell which it is. Concurrent
/// writes wait for the lock, too, so now and then a writer is let in alone.
///
/// Pure: `WriteJoiner` reports the times of the writes.
struct WriterMode {
    private(set) var isParallel = false
    /// Times of the recent lone writes.
    private var recent = CallTimes()
    private var patience = Self.patience.lowerBound
    private var writesUntilTrial = 0
    private var loneWrites = 0

    /// Number of writes until a lone one is tried; doubled after each failed trial.
    private static let patience = 128...4096

    /// Notes a write that was made while there was no other, so that it waited for no lock.
    mutating func noteLone(_ times: CallTimes) {
        recent = recent.faded + times.waiting(from: CallTimes.manyTimesAlone)
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

    /// Notes a write that was begun beside others.
    mutating func noteParallel() {
        writesUntilTrial -= 1
        if writesUntilTrial <= 0 { isParallel = false }
    }
}
