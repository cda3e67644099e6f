/// Goes over the mappings of a source from front to back; memory holds one answer of the source.
public struct MappingWalk: Sendable {
    private let source: any ImageSource
    private let holes: HoleSearch
    private var found: ArraySlice<Mapping> = []

    public init(_ source: any ImageSource, holes: HoleSearch = .thorough) {
        self.source = source
        self.holes = holes
    }

    /// The mapping from a guest offset on.
    ///
    /// - Parameters:
    ///   - offset: in bytes. Before that of an earlier call, the source is asked again.
    ///   - limit: how far to ask the source, in bytes.
    /// - Throws: `ImageError` for damaged tables, and where they cannot be read.
    public mutating func mapping(at offset: Int64, limit: Int64) async throws -> Mapping {
        if let known = known(at: offset, limit: limit) { return known }
        try await load(at: offset, limit: limit)
        return found[found.startIndex]
    }

    /// As `mapping`, without waiting. There can be millions of mappings, and an asynchronous call
    /// for each takes longer than all else.
    ///
    /// - Returns: nil if `load` has to be called first.
    public mutating func known(at offset: Int64, limit: Int64) -> Mapping? {
        while let first = found.first, first.range.upperBound <= offset { found.removeFirst() }
        guard let first = found.first, first.range.contains(offset) else { return nil }
        return first.clipped(to: offset..<limit)
    }

    /// Asks the source; parameters as of `mapping`.
    public mutating func load(at offset: Int64, limit: Int64) async throws {
        found = try await source.mappings(at: offset, limit: limit, holes: holes)[...]
        precondition(found.first?.range.lowerBound == offset)
    }
}
