import Concurrency
import DiskImage

/// The third stage: places chunks in guest order and writes them.
///
/// Placing is bookkeeping in memory. It has turns of its own where host offsets are handed out, so
/// that the same bytes come out however the workers run, and no chunk waits for a write to be
/// placed. Ordered writes take turns, too; with `-W` they do not, and nothing else changes.
struct WriteStage: Sendable {
    /// The source of the chunks' mappings.
    let extents: any ImageSource
    let target: any ImageTarget
    private let placing: TurnGate?
    private let writing: TurnGate?
    private let overlaps: Bool

    /// - Parameter overlaps: whether ordered writes only begin in order; otherwise each waits until
    ///   the one before it is done.
    init(
        extents: any ImageSource, target: any ImageTarget, isOrdered: Bool, overlaps: Bool
    ) {
        self.overlaps = overlaps
        self.extents = extents
        self.target = target
        placing = target.traits.placesInOrder ? TurnGate() : nil
        writing = isOrdered ? TurnGate() : nil
    }

    /// Places a chunk when it is its turn. `write` must follow.
    ///
    /// - Throws: what the target throws, or `CancellationError` while waiting for a turn that will
    ///   not come because another worker failed.
    func place(
        _ pieces: [EncodedPiece], of chunk: Chunk, encoded: RawSpan
    ) async throws -> Placement {
        try await placing?.enter(chunk.sequence)
        let placement = try await target.place(pieces, encoded: encoded)
        placing?.leave()
        return placement
    }

    /// - Throws: as `place`.
    func write(_ placement: Placement, of chunk: Chunk, data: RawSpan) async throws {
        guard !placement.writes.isEmpty else {
            writing?.skip(chunk.sequence)
            return
        }
        try await writing?.enter(chunk.sequence)
        if overlaps { writing?.leave() }
        try await target.write(
            placement, data: data,
            origin: BufferOrigin(
                layers: extents.layers, mappings: chunk.mappings, start: chunk.start))
        if !overlaps { writing?.leave() }
    }

    /// Runs a body when it is the chunk's turn to be placed and to be written.
    func inTurn<Result>(of chunk: Chunk, _ body: () -> Result) async throws -> Result {
        try await placing?.enter(chunk.sequence)
        try await writing?.enter(chunk.sequence)
        defer {
            placing?.leave()
            writing?.leave()
        }
        return body()
    }
}
