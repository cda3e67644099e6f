import DiskImage
import ImageStorage

/// The second stage: reads a chunk and encodes it for the target.
///
/// All CPU work on a chunk happens here, in parallel: decompressing, searching for zeros,
/// compressing.
struct ReadStage: Sendable {
    let source: any ImageSource
    /// The source of the chunks' mappings.
    let extents: any ImageSource
    let target: any ImageTarget

    /// - Returns: the encoded chunk; its bytes are in the buffers.
    func prepare(
        _ chunk: Chunk, data: inout IOBuffer, encoded: inout IOBuffer
    ) async throws -> [EncodedPiece] {
        var pieces: [EncodedPiece] = []
        var used = 0
        for segment in chunk.segments {
            switch segment.action {
            case .skip, .share: break
            case .zero: pieces.append(EncodedPiece(guestRange: segment.range, form: .zero))
            case .copy:
                let start = Int(segment.range.lowerBound - chunk.start)
                let positions = start..<start + segment.range.count
                try await fetch(segment, to: positions, in: &data)
                var room = encoded.mutableBytes
                pieces += try target.encode(
                    data.bytes, positions: positions, at: segment.range.lowerBound,
                    into: &room, used: &used)
            }
        }
        return pieces
    }

    /// Reads guest bytes; zeros behind the end of the disk fill the target's last unit.
    private func fetch(
        _ segment: Chunk.Segment, to positions: Range<Int>, in data: inout IOBuffer
    ) async throws {
        var all = data.mutableBytes
        let padded = positions.upperBound.roundedUp(to: Int(target.traits.granularity))
        all.zeroFill(positions.upperBound..<min(padded, all.byteCount))
        var rest = segment.mappings[...]
        while let first = rest.first {
            let isOwn = first.content != .unallocated
            let run = rest.prefix { ($0.content != .unallocated) == isOwn }
            rest = rest[run.endIndex...]
            let start = positions.lowerBound - Int(segment.range.lowerBound)
            let end = Int(run[run.endIndex - 1].range.upperBound)
            var part = all.slice(start + Int(first.range.lowerBound)..<start + end)
            if isOwn {
                try await extents.read(run, into: &part)
            } else {
                // The unit is stored whole, with a part that the target's backing file would
                // provide.
                try await source.read(into: &part, at: first.range.lowerBound)
            }
        }
    }
}
