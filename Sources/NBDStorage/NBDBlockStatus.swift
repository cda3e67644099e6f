import DiskImage

/// What a server said about a range, without gaps.
struct NBDBlockStatus: Sendable {
    private let extents: [Extent]

    /// - Parameter extents: each begins where the one before it ends.
    init(_ extents: [Extent] = []) { self.extents = extents }

    /// What it says from an offset on, with neighbours of a kind joined; nil if that is nothing.
    func extent(at offset: Int64, limit: Int64) -> Extent? {
        // Sorted: the first that ends behind the offset.
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
        let content = extents[low].content
        var end = extents[low].range.upperBound
        var next = low + 1
        while next < extents.count, end < limit, extents[next].content == content {
            end = extents[next].range.upperBound
            next += 1
        }
        return Extent(range: offset..<min(end, limit), content: content)
    }
}

/// The last answer about block status, as long as it holds: the pipeline asks for neighbours.
struct NBDKnownStatus: Sendable {
    private(set) var known = NBDBlockStatus()
    /// How often the export has been changed.
    private(set) var changes = 0

    /// - Parameter changes: before the server was asked. Its answer may be older than a change since then.
    mutating func note(_ answer: NBDBlockStatus, asOf changes: Int) {
        guard changes == self.changes else { return }
        known = answer
    }

    mutating func noteChange() {
        changes += 1
        known = NBDBlockStatus()
    }
}
