import Concurrency
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
    /// The disk that the target shows already; nil if it is not compared.
    let shown: (any ImageSource)?
    private let shownBuffers = IOBufferPool()

    init(
        source: any ImageSource, extents: any ImageSource, target: any ImageTarget,
        shown: (any ImageSource)?
    ) {
        self.source = source
        self.extents = extents
        self.target = target
        self.shown = shown
    }

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
                for part in try await changed(positions, segment, data) {
                    let offset = Int64(part.lowerBound - positions.lowerBound)
                    var room = encoded.mutableBytes
                    pieces += try target.encode(
                        data.bytes, positions: part, at: segment.range.lowerBound + offset,
                        into: &room, used: &used)
                }
            }
        }
        return pieces
    }

    /// The parts of a segment in which the target does not show the source's bytes, in whole units.
    private func changed(
        _ positions: Range<Int>, _ segment: Chunk.Segment, _ data: borrowing IOBuffer
    ) async throws -> [Range<Int>] {
        guard let shown else { return [positions] }
        var buffer = try shownBuffers.take(byteCount: positions.count)
        var all = buffer.mutableBytes
        var own = all.slice(0..<positions.count)
        try await shown.read(into: &own, at: segment.range.lowerBound)
        let unit = Int(target.traits.granularity)
        var parts: [Range<Int>] = []
        for start in stride(from: 0, to: positions.count, by: unit) {
            let range = start..<min(start + unit, positions.count)
            let place = positions.lowerBound + start..<positions.lowerBound + range.upperBound
            let difference = ByteComparison.firstDifference(
                data.bytes.extracting(place), buffer.bytes.extracting(range))
            guard difference != nil else { continue }
            if let last = parts.last, last.upperBound == place.lowerBound {
                parts[parts.count - 1] = last.lowerBound..<place.upperBound
            } else {
                parts.append(place)
            }
        }
        shownBuffers.giveBack(buffer)
        return parts
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
