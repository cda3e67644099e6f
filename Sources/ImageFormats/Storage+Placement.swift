import DiskImage
import ImageStorage

extension Storage {
    /// How much of it one call takes along, far below what the kernel does.
    private static var mostParts: Int { 64 }

    func write(_ bytes: [UInt8], at offset: Int64) async throws {
        let span = bytes.span.bytes
        try await write(span, at: offset)
    }

    /// Writes what a target has placed, plain clusters out of a chunk's buffer. Shares blocks with the data's
    /// origin where it can.
    func write(
        _ placement: Placement, data: RawSpan, origin: BufferOrigin? = nil
    ) async throws {
        var rest = placement.writes[...]
        while let write = rest.first {
            rest.removeFirst()
            switch write.bytes {
            case .plain(let positions):
                if origin != nil, sharesBlocks {
                    try await writePlain(positions, of: data, at: write.hostOffset, origin)
                } else {
                    try await self.write(Self.takeRuns(from: write, &rest), of: data)
                }
            case .compressed(let run): try await self.write(run.bytes, at: write.hostOffset)
            case .metadata(let table):
                try await self.write(table, at: write.hostOffset)
            case .zeros(let length):
                try await zero(write.hostOffset..<write.hostOffset + length, mayUnmap: true)
            }
        }
    }

    /// Takes off what else is plain.
    ///
    /// - Returns: it and the first, wherever they go.
    private static func takeRuns(
        from first: Placement.Write, _ rest: inout ArraySlice<Placement.Write>
    ) -> [BufferRun] {
        var runs: [BufferRun] = []
        var next: Placement.Write? = first
        while let write = next, case .plain(let positions) = write.bytes {
            let parts = [positions] + takeNeighbours(of: write, from: &rest)
            runs.append(BufferRun(offset: write.hostOffset, parts: parts))
            next = rest.first
            if case .plain? = next?.bytes { rest.removeFirst() }
        }
        return runs
    }

    /// Takes off the writes that follow one on the host, though not in the buffer.
    ///
    /// - Returns: their positions in the buffer.
    private static func takeNeighbours(
        of first: Placement.Write, from rest: inout ArraySlice<Placement.Write>
    ) -> [Range<Int>] {
        guard case .plain(let positions) = first.bytes else { return [] }
        var parts: [Range<Int>] = []
        var end = first.hostOffset + Int64(positions.count)
        while let next = rest.first, next.hostOffset == end, parts.count < mostParts,
            case .plain(let positions) = next.bytes
        {
            parts.append(positions)
            end += Int64(positions.count)
            rest.removeFirst()
        }
        return parts
    }

    private func writePlain(
        _ positions: Range<Int>, of data: RawSpan, at hostOffset: Int64, _ origin: BufferOrigin?
    ) async throws {
        var rest = positions
        var hostOffset = hostOffset
        while !rest.isEmpty {
            var count = rest.count
            if let origin, sharesBlocks, let location = try await origin.location(of: rest) {
                let shared = Int(share(location, at: hostOffset))
                // One write instead of many, once it is known that nothing will be shared.
                count = shared > 0 || sharesBlocks ? location.range.count : count
                if shared < count {
                    let unshared = rest.lowerBound + shared..<rest.lowerBound + count
                    try await write(data.extracting(unshared), at: hostOffset + Int64(shared))
                }
            } else {
                try await write(data.extracting(rest), at: hostOffset)
            }
            rest = rest.lowerBound + count..<rest.upperBound
            hostOffset += Int64(count)
        }
    }
}
