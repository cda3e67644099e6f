import DiskImage
import ImageStorage

/// The answer of a server about a range, without gaps.
struct NBDBlockStatus: Sendable {
    private let extents: [Extent]

    /// - Parameter extents: each begins where the previous one ends.
    init(_ extents: [Extent] = []) { self.extents = extents }

    /// The extent at an offset, joined with equal neighbours; nil if the answer has none there.
    func extent(at offset: Int64, limit: Int64) -> Extent? {
        // The extents are sorted: finds the first that ends behind the offset.
        var low = 0
        var high = extents.count
        while low < high {
            let middle = (low + high) / 2
            if extents[middle].range.upperBound <= offset {
                low = middle + 1
            } else {
                high = middle
            }
        }
        guard low < extents.count, extents[low].range.contains(offset) else { return nil }
        let isHole = extents[low].isHole
        var end = extents[low].range.upperBound
        var next = low + 1
        while next < extents.count, end < limit, extents[next].isHole == isHole {
            end = extents[next].range.upperBound
            next += 1
        }
        return Extent(range: offset..<min(end, limit), isHole: isHole)
    }
}

/// The last answer about block status while it is valid, because a pipeline asks for neighbours.
struct NBDKnownStatus: Sendable {
    private(set) var known = NBDBlockStatus()
    /// Number of changes to the export.
    private(set) var changes = 0

    /// - Parameter changes: number before the server was asked. A later change makes the answer
    ///   invalid.
    mutating func note(_ answer: NBDBlockStatus, asOf changes: Int) {
        guard changes == self.changes else { return }
        known = answer
    }

    mutating func noteChange() {
        changes += 1
        known = NBDBlockStatus()
    }
}
