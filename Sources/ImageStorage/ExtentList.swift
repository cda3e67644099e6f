import DiskImage

/// The answer of a server about a range: extents without gaps.
package struct ExtentList: Sendable {
    private let extents: [Extent]

    /// - Parameter extents: each begins where the previous one ends.
    package init(_ extents: [Extent] = []) { self.extents = extents }

    /// The extent at an offset, joined with equal neighbours; nil if the answer has none there.
    package func extent(at offset: Int64, limit: Int64) -> Extent? {
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
        var found = extents[low]
        var end = found.range.upperBound
        var next = low + 1
        while next < extents.count, end < limit, extents[next].isHole == found.isHole,
            extents[next].shown == found.shown
        {
            end = extents[next].range.upperBound
            next += 1
        }
        found.range = offset..<min(end, limit)
        return found
    }
}
