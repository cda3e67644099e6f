import DiskImage

/// Neighbouring host clusters to which a table refers; packed, because there can be a run for each
/// entry.
struct ClusterRun: Sendable, Equatable {
    /// Index of the first cluster; not an offset.
    private let first: UInt32
    private var countAndMark: UInt32

    static let maximumCount = 1 << 30
    private static let countMask = UInt32(maximumCount) - 1

    /// - Parameter count: less than `maximumCount`.
    init(cluster: Int, count: Int, mark: ReferenceMark) {
        first = UInt32(cluster)
        countAndMark = UInt32(count) & Self.countMask | UInt32(mark.rawValue) << 16
    }

    var cluster: Int { Int(first) }
    var count: Int { Int(countAndMark & Self.countMask) }
    var mark: UInt16 { UInt16(truncatingIfNeeded: (countAndMark & ~Self.countMask) >> 16) }
}

/// The statement of an entry about the refcount of its cluster.
enum ReferenceMark: UInt16, Sendable {
    /// No statement: the entry has no such flag, or is not in an active table.
    case none = 0
    /// The refcount is one.
    case copied = 0x4000
    /// The refcount is not one.
    case shared = 0x8000
}

/// The number of references to each host cluster: 16 bits for each, in chunks that are allocated
/// when their first cluster is counted. As long as few clusters of a chunk are counted, it holds
/// only these, so that memory grows with the clusters that tables name, whatever lies between.
///
/// 14 bits count. The other two remember what the entries say about the refcount (OFLAG_COPIED), so
/// that one walk over the tables tells whether all flags are right.
struct ReferenceCounts: Sendable {
    static let chunkSize = 1 << 11
    static let bytesPerCount = 2
    static let countMask: UInt16 = 0x3fff

    private(set) var clusterCount: Int
    /// Largest value of a refcount of the image.
    private let maximum: UInt64
    /// Empty if nothing is counted yet; shorter than `chunkSize` if few clusters are counted, and
    /// then pairs of a position and its value.
    private var chunks: [[UInt16]]
    /// Length in elements up to which a chunk consists of pairs, because finding one takes a linear
    /// search.
    private static let longestPairs = 64
    /// Counts of the clusters whose 14 bits are all set.
    private var large: [Int: UInt64] = [:]

    init(clusterCount: Int, refcountBits: Int) {
        self.clusterCount = clusterCount
        maximum = RefcountBlock.maximum(bits: refcountBits)
        chunks = Array(repeating: [], count: clusterCount.dividedUp(by: Self.chunkSize))
    }

    /// The counts with their marks from cluster `index * chunkSize` on; empty stands for zeros.
    func chunk(_ index: Int) -> [UInt16] {
        guard index < chunks.count else { return [] }
        let chunk = chunks[index]
        return chunk.isEmpty || chunk.count == Self.chunkSize ? chunk : Self.spread(chunk)
    }

    subscript(cluster: Int) -> UInt64 {
        let index = cluster / Self.chunkSize
        guard index < chunks.count,
            let place = Self.place(of: cluster % Self.chunkSize, in: chunks[index])
        else { return 0 }
        let count = chunks[index][place] & Self.countMask
        return count == Self.countMask ? large[cluster] ?? UInt64(count) : UInt64(count)
    }

    /// Index of a position's value in a chunk; nil if the value is zero and not stored.
    private static func place(of position: Int, in chunk: [UInt16]) -> Int? {
        if chunk.count == chunkSize { return position }
        for pair in stride(from: 0, to: chunk.count, by: 2) where chunk[pair] == position {
            return pair + 1
        }
        return nil
    }

    /// Index of a position's value in a chunk. If the value is not stored, it is added first.
    private static func makePlace(of position: Int, in chunk: inout [UInt16]) -> Int {
        if let place = place(of: position, in: chunk) { return place }
        if chunk.count < longestPairs {
            chunk.append(UInt16(position))
            chunk.append(0)
            return chunk.count - 1
        }
        chunk = spread(chunk)
        return position
    }

    /// Converts pairs to the values of all positions.
    private static func spread(_ pairs: [UInt16]) -> [UInt16] {
        var chunk = [UInt16](repeating: 0, count: chunkSize)
        for pair in stride(from: 0, to: pairs.count, by: 2) {
            chunk[Int(pairs[pair])] = pairs[pair + 1]
        }
        return chunk
    }

    /// Adds one reference to each cluster of the runs.
    ///
    /// - Parameter onOverflow: called for a cluster whose count is already as high as a refcount
    ///   can be, and stays so.
    mutating func add(_ runs: ArraySlice<ClusterRun>, onOverflow: (_ cluster: Int) -> Void) {
        // The chunk of the last single cluster, moved out of `chunks` while single clusters of this
        // chunk follow, because scattered clusters come one by one.
        var current: [UInt16] = []
        var currentIndex: Int?
        func putBack() {
            if let index = currentIndex { swap(&chunks[index], &current) }
            currentIndex = nil
        }
        let limit = limit
        for run in runs {
            let index = run.cluster / Self.chunkSize
            let position = run.cluster % Self.chunkSize
            if run.count == 1, run.cluster < clusterCount {
                if index != currentIndex {
                    putBack()
                    swap(&chunks[index], &current)
                    currentIndex = index
                }
                if Self.add(&current, position..<position + 1, run.mark, limit) > position {
                    continue
                }
            }
            putBack()
            add(run, onOverflow)
        }
        putBack()
    }

    /// Count below which one can be added without a look at `large` and `maximum`.
    private var limit: UInt16 { UInt16(min(maximum, UInt64(Self.countMask) - 1)) }

    private mutating func add(_ run: ClusterRun, _ onOverflow: (_ cluster: Int) -> Void) {
        let end = run.cluster + run.count
        grow(to: end)
        let limit = limit
        var cluster = run.cluster
        while cluster < end {
            let index = cluster / Self.chunkSize
            let first = index * Self.chunkSize
            let stop = min(end, first + Self.chunkSize)
            let done = Self.add(&chunks[index], cluster - first..<stop - first, run.mark, limit)
            cluster = first + done
            if cluster < stop {
                addLarge(cluster, run.mark, onOverflow)
                cluster += 1
            }
        }
    }

    /// - Returns: the first position whose count has reached `limit`, or the end of the range.
    private static func add(
        _ chunk: inout [UInt16], _ range: Range<Int>, _ mark: UInt16, _ limit: UInt16
    ) -> Int {
        if chunk.count < chunkSize {
            guard range.count > 1 else {
                let place = makePlace(of: range.lowerBound, in: &chunk)
                if chunk[place] & countMask >= limit { return range.lowerBound }
                chunk[place] = (chunk[place] + 1) | mark
                return range.upperBound
            }
            chunk = spread(chunk)
        }
        for position in range {
            let value = chunk[position]
            if value & countMask >= limit { return position }
            chunk[position] = (value + 1) | mark
        }
        return range.upperBound
    }

    private mutating func addLarge(
        _ cluster: Int, _ mark: UInt16, _ onOverflow: (Int) -> Void
    ) {
        let count = self[cluster]
        let index = cluster / Self.chunkSize
        let place = Self.makePlace(of: cluster % Self.chunkSize, in: &chunks[index])
        chunks[index][place] |= mark
        guard count < maximum else { return onOverflow(cluster) }
        if count + 1 < UInt64(Self.countMask) {
            chunks[index][place] += 1
        } else {
            chunks[index][place] |= Self.countMask
            large[cluster] = count + 1
        }
    }

    private mutating func grow(to end: Int) {
        guard end > clusterCount else { return }
        clusterCount = end
        while chunks.count * Self.chunkSize < end { chunks.append([]) }
    }

    func hasReferences(in range: Range<Int>) -> Bool {
        var cluster = range.lowerBound
        while cluster < min(range.upperBound, clusterCount) {
            let index = cluster / Self.chunkSize
            let start = index * Self.chunkSize
            let stop = min(range.upperBound, start + Self.chunkSize)
            let chunk = chunk(index)
            if !chunk.isEmpty,
                chunk[cluster - start..<stop - start].contains(where: { $0 & Self.countMask != 0 })
            {
                return true
            }
            cluster = stop
        }
        return false
    }

    /// Counts free clusters as used once.
    mutating func take(_ clusters: Range<Int>) {
        guard !clusters.isEmpty else { return }
        let run = ClusterRun(cluster: clusters.lowerBound, count: clusters.count, mark: .none)
        add([run]) { _ in }
    }

    /// Makes clusters free again that `take` has counted.
    mutating func release(_ clusters: Range<Int>) {
        for cluster in clusters {
            let index = cluster / Self.chunkSize
            let place = Self.makePlace(of: cluster % Self.chunkSize, in: &chunks[index])
            chunks[index][place] = 0
        }
    }

    /// The first of `count` neighbouring clusters without references, from `start` on, perhaps
    /// behind the end.
    func firstFree(_ count: Int, from start: Int, avoiding taken: Set<Int>) -> Int {
        var first = start
        var cluster = start
        while cluster - first < count {
            if taken.contains(cluster) || (cluster < clusterCount && self[cluster] != 0) {
                first = cluster + 1
            }
            cluster += 1
        }
        return first
    }
}
