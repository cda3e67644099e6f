import DiskImage

/// The result of comparing refcounts with the numbers of references.
struct RefcountComparison: Sendable {
    struct Mismatch: Sendable {
        var cluster: Int
        var refcount: UInt64
        var references: UInt64
    }

    var mismatches: [Mismatch] = []
    /// The last cluster that has a refcount or a reference.
    var lastUsed: Int?
    /// Whether the flag of an active entry contradicts the refcount.
    var contradictsMarks = false

    /// Compares a refcount block.
    ///
    /// - Parameter clusters: the clusters to compare, from the first one that the block counts.
    init(_ block: RefcountBlock, _ clusters: Range<Int>, with counts: ReferenceCounts) {
        var first = clusters.lowerBound
        while first < clusters.upperBound {
            let index = first / ReferenceCounts.chunkSize
            let stop = min(clusters.upperBound, (index + 1) * ReferenceCounts.chunkSize)
            let chunk = counts.chunk(index)
            if !chunk.isEmpty || !block.bytes.isEmpty {
                compare(block, first..<stop, firstOfBlock: clusters.lowerBound, chunk, counts)
            }
            first = stop
        }
    }

    /// - Parameter clusters: the clusters of the block whose counts are in the chunk.
    private mutating func compare(
        _ block: RefcountBlock, _ clusters: Range<Int>, firstOfBlock: Int, _ chunk: [UInt16],
        _ counts: ReferenceCounts
    ) {
        let firstOfChunk = clusters.lowerBound.roundedDown(to: ReferenceCounts.chunkSize)
        let bytes = block.bytes.span.bytes
        let isUsual = block.bits == 16 && !bytes.isEmpty && !chunk.isEmpty
        var last = -1
        for cluster in clusters {
            let position = cluster - firstOfBlock
            let refcount: UInt64
            let value: UInt16
            if isUsual {
                refcount = UInt64(bytes.bigEndian(at: position * 2, as: UInt16.self))
                value = chunk[cluster - firstOfChunk]
            } else {
                refcount = block[position]
                value = chunk.isEmpty ? 0 : chunk[cluster - firstOfChunk]
            }
            if refcount | UInt64(value) == 0 { continue }
            last = cluster
            let copied = value & ReferenceMark.copied.rawValue != 0
            let shared = value & ReferenceMark.shared.rawValue != 0
            if refcount == 1 ? shared : copied { contradictsMarks = true }
            let count = value & ReferenceCounts.countMask
            if refcount != UInt64(count) || count == ReferenceCounts.countMask {
                let references = counts[cluster]
                guard refcount != references else { continue }
                mismatches.append(
                    Mismatch(cluster: cluster, refcount: refcount, references: references))
            }
        }
        if last >= 0 { lastUsed = last }
    }
}
