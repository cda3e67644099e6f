import DiskImage

/// Neighbouring host clusters to which a table refers; packed, because there can be one for each
/// entry.
struct ClusterRun: Sendable, Equatable {
    /// The first of them: a number, not an offset.
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

/// What the entry that refers to a cluster says about its refcount.
enum ReferenceMark: UInt16, Sendable {
    /// Nothing: the entry has no such flag, or is not in an active table.
    case none = 0
    /// That it is one.
    case copied = 0x4000
    /// That it is not one.
    case shared = 0x8000
}

/// The number of references to each host cluster: 16 bits for each, in pieces made when the first
/// is counted. Where few clusters of a piece are counted it holds these alone, so that memory goes
/// with what the tables name, whatever lies between.
///
/// 14 bits count. The two others remember what the entries say about the refcount (OFLAG_COPIED),
/// so that one walk over the tables tells whether all is well.
struct ReferenceCounts: Sendable {
    static let chunkSize = 1 << 11
    static let bytesPerCount = 2
    static let countMask: UInt16 = 0x3fff

    private(set) var clusterCount: Int
    /// What a refcount of the image can be at most.
    private let maximum: UInt64
    /// Empty where nothing is counted yet; shorter than `chunkSize` where few are: pairs of a
    /// position and its value.
    private var chunks: [[UInt16]]
    /// Up to where pairs are looked for one by one, in elements.
    private static let longestPairs = 64
    /// The counts of clusters whose 14 bits are all set.
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

    /// Where the value of a position is; nil if it is zero and has no place.
    private static func place(of position: Int, in chunk: [UInt16]) -> Int? {
        if chunk.count == chunkSize { return position }
        var pair = 0
        while pair < chunk.count {
            if chunk[pair] == position { return pair + 1 }
            pair += 2
        }
        return nil
    }

    /// Where the value of a position is, after one has been made if there was none.
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

    /// Values for all positions, from pairs.
    private static func spread(_ pairs: [UInt16]) -> [UInt16] {
        var chunk = [UInt16](repeating: 0, count: chunkSize)
        for pair in stride(from: 0, to: pairs.count, by: 2) {
            chunk[Int(pairs[pair])] = pairs[pair + 1]
        }
        return chunk
    }

    /// Counts one more reference to each cluster of some runs.
    ///
    /// - Parameter onOverflow: called for a cluster whose count is as high as a refcount can be,
    ///   and stays so.
    mutating func add(_ runs: ArraySlice<ClusterRun>, onOverflow: (_ cluster: Int) -> Void) {
        // The chunk of the last single cluster, taken out of the others: scattered ones come one by
        // one.
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

    /// What the plain bits count without a look at the rest.
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

    /// - Returns: the first cluster whose count has reached `limit`, or the end of the range.
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

    /// Makes clusters free again that `take` has taken.
    mutating func release(_ clusters: Range<Int>) {
        for cluster in clusters {
            let index = cluster / Self.chunkSize
            let place = Self.makePlace(of: cluster % Self.chunkSize, in: &chunks[index])
            chunks[index][place] = 0
        }
    }

    /// Where as many neighbouring clusters have no reference, from `start` on; perhaps beyond the
    /// end.
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
