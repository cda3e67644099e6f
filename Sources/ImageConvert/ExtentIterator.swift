import Concurrency
import DiskImage

/// A piece of guest disk on its way through the pipeline.
public struct Chunk: Sendable, Equatable {
    public struct Segment: Sendable, Equatable {
        /// Guest offsets in bytes.
        public var range: Range<Int64>
        /// `.copy`, `.zero` or `.share`. Skipped ranges have no segment, and a chunk shares all of
        /// its segments or none.
        public var action: CopyAction
        /// The places of the bytes of a segment that is copied or shared; empty for other ones.
        var mappings: [Mapping]

        public init(range: Range<Int64>, action: CopyAction, mappings: [Mapping] = []) {
            self.range = range
            self.action = action
            self.mappings = mappings
        }
    }

    /// Number in guest order: 0, 1, 2, … without gaps.
    public var sequence: Int
    /// Guest offset in bytes of the start of the data buffer, a multiple of a page: all copied
    /// segments lie behind it, within one cell of the grid.
    public var start: Int64
    /// In guest order, at least one.
    public var segments: [Segment]
    /// Guest offset in bytes where the previous chunk ended.
    public var begin: Int64
    /// Guest offset in bytes where the next chunk begins.
    public var end: Int64
    /// Whether the target shares the chunk's data instead of writing what is read.
    var isShared: Bool { segments[0].action == .share }

    /// O_DIRECT needs file offsets and memory addresses that agree in this many bytes.
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

    /// Whether a part of the chunk has to be decompressed.
    var isCompressed: Bool {
        segments.contains { $0.mappings.contains { $0.content == .compressed } }
    }

    /// The sum of all segments, in bytes.
    var length: Int64 { segments.reduce(0) { $0 + Int64($1.range.count) } }

    /// Size of the data buffer in bytes, up to the end of the last copied segment.
    ///
    /// - Parameter granularity: the buffer ends at a multiple of this.
    func dataSize(_ granularity: Int64) -> Int {
        guard let last = segments.last(where: { $0.action == .copy }) else { return 0 }
        return Int((last.range.upperBound - start).roundedUp(to: granularity))
    }
}

/// Walks over the source and cuts it into chunks.
///
/// Memory holds one answer of the source and one chunk, never a list of them. Chunks that need
/// reading lie on a fixed grid; zeros may extend over many cells of it.
///
/// The grid can begin a little into the disk (`gridStart`): a write that is not aligned to its own
/// length fills a page cache with folios of several sizes, an aligned one with folios of its own
/// size only. Measured on a virtual machine, aligned ones are slower there; probably their memory
/// has been given back to the host.
public actor ExtentIterator {
    /// Limit for the zeros of a chunk, in bytes: few calls where zeros are fast, and many
    /// concurrent chunks where they have to be written.
    private static let longestZeroes: Int64 = 1 << 30
    /// Limit for the shared blocks of a chunk, in bytes, so that progress is reported now and then.
    private static let longestShare: Int64 = 1 << 30
    /// Limit for chunks in which zeros and skipped ranges alternate, or which share many small
    /// pieces.
    private static let mostSegments = 64
    /// Distance in bytes up to which the source is asked. Walking tables far ahead would keep all
    /// workers waiting for the first chunk.
    private static let lookAhead: Int64 = 1 << 30

    private let policy: CopyPolicy
    private let granularity: Int64
    private var chunkSize: Int64
    private let gridStart: Int64
    private let sharesUnread: @Sendable () -> Bool
    /// Limit for the compressed data of a chunk, in guest bytes.
    private let longestCompressed: Int64
    private let source: any ImageSource
    /// End of the disk in bytes; too far away for an open-ended one until it is reached.
    private var end: Int64

    private var position: Int64 = 0
    private var sequence = 0
    private var walk: MappingWalk
    /// While one caller waits for the source, the actor admits the next one; two callers in the
    /// middle of the walk would cut chunks out of order.
    private let turn = SerialGate()
    /// Data that could not be shared and is to be copied, in reverse order.
    private var toCopy: [Mapping] = []
    /// Number of chunks being shared, which may still give data back.
    private var sharesInFlight = 0
    private var waitingForShares: [CheckedContinuation<Void, Never>] = []

    /// - Parameters:
    ///   - source: asked for mappings only.
    ///   - granularity: actions change only at its multiples, in bytes.
    ///   - chunkSize: of the grid, in bytes, a multiple of the granularity.
    ///   - gridStart: where its first line is, in bytes, a multiple of the granularity and shorter
    ///     than a chunk.
    ///   - longestCompressed: limit for the compressed data of a chunk, in guest bytes, a multiple
    ///     of the granularity.
    ///   - sharesUnread: whether data may be left to the target to share, at this moment.
    public init(
        source: any ImageSource, policy: CopyPolicy, granularity: Int64, chunkSize: Int64,
        gridStart: Int64 = 0, longestCompressed: Int64? = nil,
        sharesUnread: @escaping @Sendable () -> Bool = { false }
    ) {
        precondition(chunkSize % granularity == 0 && gridStart % granularity == 0)
        precondition(gridStart < chunkSize)
        self.source = source
        walk = MappingWalk(source)
        self.policy = policy
        self.granularity = granularity
        self.chunkSize = chunkSize
        self.gridStart = gridStart
        self.longestCompressed = longestCompressed ?? source.virtualSize
        self.sharesUnread = sharesUnread
        end = source.virtualSize
    }

    /// The next chunk with something to do; nil at the end of the disk.
    ///
    /// - Parameter size: largest length of a copied chunk in bytes, a multiple of the granularity;
    ///   nil keeps the previous one.
    public func next(upTo size: Int64? = nil) async throws -> Chunk? {
        while true {
            await turn.enter()
            defer { turn.leave() }
            try Task.checkCancellation()
            if let size { chunkSize = size }
            if let chunk = nextToCopy() { return chunk }
            if let chunk = try await findNext() {
                if chunk.isShared { sharesInFlight += 1 }
                return chunk
            }
            guard sharesInFlight > 0 else { return nil }
            await withCheckedContinuation { waitingForShares.append($0) }
        }
    }

    /// Notes that a shared chunk is done, except for these mappings, which have to be copied.
    func takeBack(_ mappings: [Mapping]) {
        toCopy += mappings.reversed()
        sharesInFlight -= 1
        for waiter in waitingForShares { waiter.resume() }
        waitingForShares = []
    }

    private func nextToCopy() -> Chunk? {
        guard let first = toCopy.last else { return nil }
        let cell = first.range.lowerBound..<cellEnd(after: first.range.lowerBound)
        var parts: [Mapping] = []
        while let next = toCopy.last, next.range.lowerBound < cell.upperBound,
            next.range.lowerBound == parts.last?.range.upperBound ?? cell.lowerBound
        {
            toCopy.removeLast()
            parts.append(next.clipped(to: cell))
            if next.range.upperBound > cell.upperBound {
                toCopy.append(next.clipped(to: cell.upperBound..<next.range.upperBound))
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
            // Skipped ranges may be as long as a header claims.
            try Task.checkCancellation()
            guard let step = try await nextStep() else { break }
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

    /// The first line of the grid behind a guest offset.
    private func cellEnd(after offset: Int64) -> Int64 {
        (offset + 1 - gridStart + chunkSize).roundedUp(to: chunkSize) - chunkSize + gridStart
    }

    /// Whether the segments up to the end of a cell are enough for a chunk. Zeros alone may go on.
    private func isFull(_ segments: [Chunk.Segment]) -> Bool {
        if let last = segments.last, last.mappings.last?.content == .compressed,
            Int64(last.range.count) >= longestCompressed
        {
            return true
        }
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

    /// The next segment. It stays within the chunk's cell, unless it starts a cell and needs no
    /// reading.
    ///
    /// - Returns: nil at the end of the disk.
    private func nextStep() async throws -> Chunk.Segment? {
        guard let mapping = try await mapping(at: position) else { return nil }
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
        if mapping.content == .compressed { limit = min(limit, position + longestCompressed) }
        if position == cellEnd(after: position - 1) {
            switch action {
            case .copy, .share: break
            case .zero: limit = position + Self.longestZeroes.roundedUp(to: chunkSize)
            case .skip: limit = end
            }
        }
        // Where the target begins to read as zeros, the action for zeros changes; the unit that
        // straddles this offset is treated as its first byte demands.
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

    /// A unit that several mappings share. It is copied unless all of them need the same action.
    private func mixedUnit(_ unitEnd: Int64) async throws -> Chunk.Segment {
        var parts: [Mapping] = []
        var action: CopyAction?
        var offset = position
        while offset < unitEnd, let mapping = try await mapping(at: offset) {
            let part = mapping.clipped(to: offset..<min(unitEnd, end))
            let wanted = policy.action(for: part.content, at: offset)
            action = action ?? wanted == wanted ? wanted : .copy
            parts.append(part)
            offset = part.range.upperBound
        }
        return Chunk.Segment(
            range: position..<offset, action: action ?? .copy,
            mappings: action == .copy ? parts : [])
    }

    /// - Returns: nil at the end of the disk.
    private func mapping(at offset: Int64) async throws -> Mapping? {
        let limit = min(end, offset + Self.lookAhead)
        if let known = walk.known(at: offset, limit: limit) { return known }
        // A copy, because an actor cannot pass its state to an asynchronous call as `inout`.
        var copy = walk
        let found = try await copy.mapping(at: offset, limit: limit)
        walk = copy
        // Only now is the end of an open-ended disk known.
        end = min(end, source.virtualSize)
        return offset < end ? found.clipped(to: offset..<end) : nil
    }
}
