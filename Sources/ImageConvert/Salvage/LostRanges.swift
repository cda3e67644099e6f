import DiskImage
import Glibc
import Synchronization

/// A stretch of a source that could not be read: the target has zeros there.
public struct LostRange: Sendable, Equatable {
    /// Number of the source, from 0 on.
    public var source: Int
    /// Guest offsets in bytes on that source's disk.
    public var range: Range<Int64>
    /// The file or export that could not be read; nil if the error names none.
    public var path: String?
    public var reason: String

    /// - Parameter range: guest offsets in bytes on the source's disk.
    init(_ range: Range<Int64>, of source: Int, _ error: ImageError) {
        self.source = source
        self.range = range
        path = error.path
        // The text of a system error names the place, by which neighbours would differ.
        reason =
            if case .system(let number) = error.kind { String(cString: strerror(number)) } else {
                error.message
            }
    }

    /// Adds a range, if it has the same reason and lies within this one or next to it.
    mutating func join(_ other: LostRange) -> Bool {
        guard source == other.source, path == other.path, reason == other.reason,
            range.lowerBound <= other.range.upperBound, other.range.lowerBound <= range.upperBound
        else { return false }
        range =
            min(
                range.lowerBound, other.range.lowerBound)..<max(
                range.upperBound, other.range.upperBound)
        return true
    }
}

/// The lost ranges of all sources, in order. Workers find them in any order, and cut at the ends of
/// their chunks.
final class LostRanges: Sendable {
    private let ranges = Mutex<[LostRange]>([])

    var all: [LostRange] { ranges.withLock { $0 } }

    func note(_ lost: LostRange) {
        ranges.withLock { ranges in
            var low = 0
            var high = ranges.count
            while low < high {
                let middle = (low + high) / 2
                let other = ranges[middle]
                if (other.source, other.range.lowerBound) < (lost.source, lost.range.lowerBound) {
                    low = middle + 1
                } else {
                    high = middle
                }
            }
            if low > 0, ranges[low - 1].join(lost) {
                low -= 1
            } else {
                ranges.insert(lost, at: low)
            }
            while low + 1 < ranges.count, ranges[low].join(ranges[low + 1]) {
                ranges.remove(at: low + 1)
            }
        }
    }
}
