import DiskImage

/// The result of comparing refcounts with the numbers of references.
struct RefcountComparison: Sendable, Equatable {
    struct Mismatch: Sendable, Equatable {
        var cluster: Int
        var refcount: UInt64
        var references: UInt64
    }

    var mismatches: [Mismatch] = []
    /// The last cluster that has a refcount or a reference.
    var lastUsed: Int?
    /// Whether the flag of an active entry contradicts the refcount.
    var contradictsMarks = false

    /// Compares some clusters of a refcount block.
    ///
    /// - Parameters:
    ///   - block: the refcount block of these clusters.
    ///   - range: the clusters to compare, counted from the block's first.
    ///   - firstOfBlock: index of the block's first cluster.
    mutating func compare(
        _ block: RefcountBlock, _ range: Range<Int>, firstOfBlock: Int, with counts: ReferenceCounts
    ) {
        var position = range.lowerBound
        while position < range.upperBound {
            let cluster = firstOfBlock + position
            let index = cluster / ReferenceCounts.chunkSize
            let chunkStart = index * ReferenceCounts.chunkSize
            let stop = min(
                range.upperBound, chunkStart + ReferenceCounts.chunkSize - firstOfBlock)
            let chunk = counts.chunk(index)
            if !chunk.isEmpty || !block.bytes.isEmpty {
                comparePart(block, position..<stop, firstOfBlock, chunk, chunkStart, counts)
            }
            position = stop
        }
    }

    private mutating func comparePart(
        _ block: RefcountBlock, _ range: Range<Int>, _ firstOfBlock: Int, _ chunk: [UInt16],
        _ chunkStart: Int, _ counts: ReferenceCounts
    ) {
        let shift = firstOfBlock - chunkStart
        let bytes = block.bytes.span.bytes
        let isUsual = block.bits == 16 && !bytes.isEmpty && !chunk.isEmpty
        var last = -1
        for position in range {
            let refcount: UInt64
            let value: UInt16
            if isUsual {
                refcount = UInt64(bytes.bigEndian(at: position * 2, as: UInt16.self))
                value = chunk[position + shift]
            } else {
                refcount = block[position]
                value = chunk.isEmpty ? 0 : chunk[position + shift]
            }
            if refcount | UInt64(value) == 0 { continue }
            last = position
            let copied = value & ReferenceMark.copied.rawValue != 0
            let shared = value & ReferenceMark.shared.rawValue != 0
            if refcount == 1 ? shared : copied { contradictsMarks = true }
            let count = value & ReferenceCounts.countMask
            if refcount != UInt64(count) || count == ReferenceCounts.countMask {
                let cluster = firstOfBlock + position
                let references = counts[cluster]
                guard refcount != references else { continue }
                mismatches.append(
                    Mismatch(cluster: cluster, refcount: refcount, references: references))
            }
        }
        if last >= 0 { lastUsed = firstOfBlock + last }
    }
}
