import Concurrency
import DiskImage

/// A piece of guest disk on its way through the pipeline.
public struct Chunk: Sendable, Equatable {
    public struct Segment: Sendable, Equatable {
        /// Guest offsets in bytes.
        public var range: Range<Int64>
        /// `.copy`, `.zero` or `.share`; what is skipped has no segment, what is shared a chunk of
        /// its own.
        public var action: CopyAction
        /// Where the bytes are: all of the range, unless it is zeros.
        var mappings: [Mapping]

        public init(range: Range<Int64>, action: CopyAction, mappings: [Mapping] = []) {
            self.range = range
            self.action = action
            self.mappings = mappings
        }
    }

    /// Its turn: 0, 1, 2, … in guest order, without gaps.
    public var sequence: Int
    /// Where the data buffer begins on the guest disk, in bytes, a multiple of a page: what is
    /// copied lies behind it, within one cell of the grid.
    public var start: Int64
    /// Front to back, at least one.
    public var segments: [Segment]
    /// How far the disk had been looked at before this chunk, in bytes.
    public var begin: Int64
    /// How far the disk has been looked at when this chunk is done, in bytes.
    public var end: Int64
    /// It is for the target to share, not to be read.
    var isShared: Bool { segments[0].action == .share }

    /// What O_DIRECT wants offset and memory to agree in, in bytes.
    private static let pageSize: Int64 = 4096

    init(sequence: Int, segments: [Segment], begin: Int64, end: Int64) {
        self.sequence = sequence
        self.begin = begin
        self.segments = segments
        self.end = end
        start = (segments.first { $0.action == .copy }?.range.lowerBound ?? end)
            .roundedDown(to: Self.pageSize)
    }

    /// Where the bytes of the data buffer are.
    var mappings: [Mapping] { segments.flatMap(\.mappings) }

    /// Some of what is copied has to be decompressed.
    var isCompressed: Bool {
        segments.contains { $0.mappings.contains { $0.content == .compressed } }
    }

    /// The sum of all segments, in bytes.
    var length: Int64 { segments.reduce(0) { $0 + Int64($1.range.count) } }

    /// The size that the data buffer needs, in bytes: up to the end of the last copied segment.
    ///
    /// - Parameter granularity: the last unit is filled up.
    func dataSize(_ granularity: Int64) -> Int {
        guard let last = segments.last(where: { $0.action == .copy }) else { return 0 }
        return Int((last.range.upperBound - start).roundedUp(to: granularity))
    }
}

/// Walks over the source and says what there is to do, chunk by chunk.
///
/// Memory holds one answer of the source and one chunk, never a list of them. Chunks that need reading lie on a
/// fixed grid; zeros may reach over many cells of it.
///
/// The grid can begin a little into the disk (`gridStart`): a write that is not aligned to its own
/// length fills a page cache with folios of several sizes, an aligned one with folios of its own
/// size only. Measured on a virtual machine, aligned ones are slower there; probably their memory
/// has been given back to the host.
public actor ExtentIterator {
    /// Zeros per chunk, in bytes: few calls where zeros are fast, and many chunks beside each other
    /// where they have to be written.
    private static let longestZeroes: Int64 = 256 << 20
    /// Blocks to share per chunk, in bytes: one call each, after which there is progress to be
    /// seen.
    private static let longestShare: Int64 = 1 << 30
    /// Where zeros and what is skipped alternate for long, and where little pieces are shared.
    private static let mostSegments = 64
    /// How far to ask the source, in bytes. Walking tables far ahead would keep all workers waiting
    /// for the first chunk.
    private static let lookAhead: Int64 = 1 << 30

    private let policy: CopyPolicy
    private let granularity: Int64
    private var chunkSize: Int64
    private let gridStart: Int64
    private let sharesUnread: @Sendable () -> Bool
    private let end: Int64

    private var position: Int64 = 0
    private var sequence = 0
    private var mappings: MappingWalk
    /// While one caller waits for the source, the actor would let the next one in; with both
    /// half-way through the walk, chunks would come out of order.
    private let walk = SerialGate()
    /// What could not be shared after all and is to be copied, the first at the end.
    private var left: [Mapping] = []
    /// The number of chunks that are being shared, of which ranges may still come back.
    private var sharesInFlight = 0
    private var waitingForShares: [CheckedContinuation<Void, Never>] = []

    /// - Parameters:
    ///   - source: asked for mappings only.
    ///   - granularity: actions change only at its multiples, in bytes.
    ///   - chunkSize: of the grid, in bytes, a multiple of the granularity.
    ///   - gridStart: where its first line is, in bytes, a multiple of the granularity and shorter
    ///     than a chunk.
    ///   - sharesUnread: whether data may be left to the target to share, at this moment.
    public init(
        source: any ImageSource, policy: CopyPolicy, granularity: Int64, chunkSize: Int64,
        gridStart: Int64 = 0, sharesUnread: @escaping @Sendable () -> Bool = { false }
    ) {
        precondition(chunkSize % granularity == 0 && gridStart % granularity == 0)
        precondition(gridStart < chunkSize)
        mappings = MappingWalk(source)
        self.policy = policy
        self.granularity = granularity
        self.chunkSize = chunkSize
        self.gridStart = gridStart
        self.sharesUnread = sharesUnread
        end = source.virtualSize
    }

    /// The next chunk with something to do, nil at the end of the disk.
    ///
    /// - Parameter size: of a chunk that is copied, at most, in bytes, a multiple of the
    ///   granularity; nil for as much as the one before.
    public func next(upTo size: Int64? = nil) async throws -> Chunk? {
        while true {
            await walk.enter()
            defer { walk.leave() }
            try Task.checkCancellation()
            if let size { chunkSize = size }
            if let chunk = nextLeft() { return chunk }
            if let chunk = try await findNext() {
                if chunk.isShared { sharesInFlight += 1 }
                return chunk
            }
            guard sharesInFlight > 0 else { return nil }
            await withCheckedContinuation { waitingForShares.append($0) }
        }
    }

    /// A chunk that was to be shared is done, but for what is to be copied.
    func takeBack(_ mappings: [Mapping]) {
        left += mappings.reversed()
        sharesInFlight -= 1
        for waiter in waitingForShares { waiter.resume() }
        waitingForShares = []
    }

    private func nextLeft() -> Chunk? {
        guard let first = left.last else { return nil }
        let cell = first.range.lowerBound..<cellEnd(after: first.range.lowerBound)
        var parts: [Mapping] = []
        while let next = left.last, next.range.lowerBound < cell.upperBound,
            next.range.lowerBound == parts.last?.range.upperBound ?? cell.lowerBound
        {
            left.removeLast()
            parts.append(next.clipped(to: cell))
            if next.range.upperBound > cell.upperBound {
                left.append(next.clipped(to: cell.upperBound..<next.range.upperBound))
            }
        }
        let range = cell.lowerBound..<parts[parts.count - 1].range.upperBound
        defer { sequence += 1 }
        return Chunk(
            sequence: sequence,
            segments: [Chunk.Segment(range: range, action: .copy, mappings: parts)],
            begin: range.lowerBound, end: range.upperBound)
    }

    private func findNext() async throws -> Chunk? {
        var segments: [Chunk.Segment] = []
        let begin = position
        while position < end {
            // What is skipped may be as long as a header says.
            try Task.checkCancellation()
            let step = try await nextStep()
            let isShare = step.action == .share
            if let first = segments.first, isShare != (first.action == .share) { break }
            if step.action != .skip { Self.append(step, to: &segments) }
            position = step.range.upperBound
            if isShare ? isFullShare(segments) : isFull(segments) { break }
        }
        guard !segments.isEmpty else { return nil }
        defer { sequence += 1 }
        // Only zeros at the front reach over several cells: what is copied lies in the last one.
        return Chunk(sequence: sequence, segments: segments, begin: begin, end: position)
    }

    /// Where the grid has its next line behind this guest offset.
    private func cellEnd(after offset: Int64) -> Int64 {
        (offset + 1 - gridStart + chunkSize).roundedUp(to: chunkSize) - chunkSize + gridStart
    }

    /// Whether it is enough for a chunk, at the end of a cell. Zeros alone may go on.
    private func isFull(_ segments: [Chunk.Segment]) -> Bool {
        guard position == cellEnd(after: position - 1), let first = segments.first,
            let last = segments.last
        else { return false }
        return segments.contains { $0.action == .copy }
            || last.range.upperBound - first.range.lowerBound >= Self.longestZeroes
            || segments.count >= Self.mostSegments
    }

    private func isFullShare(_ segments: [Chunk.Segment]) -> Bool {
        segments.reduce(0) { $0 + Int64($1.range.count) } >= Self.longestShare
            || segments.reduce(0) { $0 + $1.mappings.count } >= Self.mostSegments
    }

    private static func append(_ next: Chunk.Segment, to segments: inout [Chunk.Segment]) {
        if let last = segments.last, last.action == next.action,
            last.range.upperBound == next.range.lowerBound
        {
            segments[segments.count - 1].range = last.range.lowerBound..<next.range.upperBound
            segments[segments.count - 1].mappings += next.mappings
        } else {
            segments.append(next)
        }
    }

    /// A range from `position` on with one action, which stays within the chunk's cell unless it
    /// starts one with nothing but zeros or nothing at all.
    private func nextStep() async throws -> Chunk.Segment {
        let mapping = try await mapping(at: position)
        let unitEnd = min(end, (position + 1).roundedUp(to: granularity))
        guard mapping.range.upperBound >= unitEnd else { return try await mixedUnit(unitEnd) }
        let action = policy.action(for: mapping.content, at: position)
        let last = mapping.range.upperBound
        let runEnd = last == end ? end : last.roundedDown(to: granularity)
        if action == .copy, mapping.content == .data, sharesUnread() {
            return Self.segment(
                mapping, position..<min(runEnd, position + Self.longestShare), .share)
        }
        var limit = cellEnd(after: position)
        if position == cellEnd(after: position - 1) {
            switch action {
            case .copy, .share: break
            case .zero: limit = position + Self.longestZeroes.roundedUp(to: chunkSize)
            case .skip: limit = end
            }
        }
        // Where the target begins to read as zeros, what is to be done with zeros changes; the unit
        // that straddles this offset is treated as its first byte demands.
        let change = policy.target.readsAsZeroFrom
        if position < change, change < min(runEnd, limit) {
            limit = max(change.roundedDown(to: granularity), unitEnd)
        }
        return Self.segment(mapping, position..<min(runEnd, limit), action)
    }

    private static func segment(
        _ mapping: Mapping, _ range: Range<Int64>, _ action: CopyAction
    ) -> Chunk.Segment {
        let isRead = action == .copy || action == .share
        return Chunk.Segment(
            range: range, action: action, mappings: isRead ? [mapping.clipped(to: range)] : [])
    }

    /// A unit that several mappings share. It is copied unless all of them ask for the same.
    private func mixedUnit(_ unitEnd: Int64) async throws -> Chunk.Segment {
        var parts: [Mapping] = []
        var action: CopyAction?
        var offset = position
        while offset < unitEnd {
            let part = try await mapping(at: offset).clipped(to: offset..<unitEnd)
            let wanted = policy.action(for: part.content, at: offset)
            action = action ?? wanted == wanted ? wanted : .copy
            parts.append(part)
            offset = part.range.upperBound
        }
        let range = position..<unitEnd
        return action == .copy
            ? Chunk.Segment(range: range, action: .copy, mappings: parts)
            : Chunk.Segment(range: range, action: action ?? .copy)
    }

    private func mapping(at offset: Int64) async throws -> Mapping {
        let limit = min(end, offset + Self.lookAhead)
        if let known = mappings.known(at: offset, limit: limit) { return known }
        // A copy: an actor lends its state to no asynchronous call.
        var walk = mappings
        let found = try await walk.mapping(at: offset, limit: limit)
        mappings = walk
        return found
    }
}
