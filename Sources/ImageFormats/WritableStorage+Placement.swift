import DiskImage
import ImageStorage

extension WritableStorage {
    /// Largest number of parts that a run of neighbours has beside its first: far below the
    /// kernel's limit for one call.
    private static var mostParts: Int { 64 }

    /// Length in bytes from which on pieces are shared; shorter ones are written. On XFS, sharing a
    /// piece takes 40 to 60 µs, whatever its length; up to here, filling as much page cache takes
    /// less. 512 MiB of 4 KiB data and 4 KiB zeros in turn took 4.0 s with all pieces shared and
    /// 0.9 s with all written; in pieces of 256 KiB both take the same time.
    private static var shortestShared: Int { 128 << 10 }

    func writeBytes(_ bytes: [UInt8], at offset: Int64) async throws {
        let span = bytes.span.bytes
        try await write(span, at: offset)
    }

    /// Writes what a target has placed, with plain clusters from a chunk's buffer. Shares blocks
    /// with the origin of the data where possible.
    func writePlacement(
        _ placement: Placement, data: RawSpan, origin: BufferOrigin? = nil
    ) async throws {
        var rest = placement.writes[...]
        while let write = rest.popFirst() {
            switch write.bytes {
            case .plain(let positions):
                let limit = origin != nil && sharesBlocks ? Self.shortestShared : .max
                if let origin, positions.count >= limit {
                    try await writePlain(positions, of: data, at: write.hostOffset, origin)
                } else {
                    let first = BufferRun(offset: write.hostOffset, parts: [positions])
                    let runs = Self.takeRuns(after: first, from: &rest, shorterThan: limit)
                    try await writeRuns(runs, of: data)
                }
            case .compressed(let run): try await self.write(run.bytes, at: write.hostOffset)
            case .metadata:
                try await writeTables([write] + Self.takeTables(from: &rest))
            case .zeros(let length):
                try await zero(write.hostOffset..<write.hostOffset + length, mayUnmap: true)
            }
        }
    }

    /// Removes the tables from the front of `rest`.
    private static func takeTables(
        from rest: inout ArraySlice<Placement.Write>
    ) -> ArraySlice<Placement.Write> {
        let tables = rest.prefix { if case .metadata = $0.bytes { true } else { false } }
        rest.removeFirst(tables.count)
        return tables
    }

    /// Writes tables at once: their order means nothing, and each may have to wait.
    private func writeTables(_ tables: [Placement.Write]) async throws {
        try await withThrowingTaskGroup(of: Void.self) { group in
            for table in tables {
                guard case .metadata(let bytes) = table.bytes else { continue }
                group.addTask { try await self.writeBytes(bytes, at: table.hostOffset) }
            }
            try await group.waitForAll()
        }
    }

    /// Removes the plain writes from the front of `rest`, up to a piece that is to be shared. Those
    /// that follow each other on the host, though not in the buffer, make one run.
    ///
    /// - Returns: these writes and `first`, whose host offsets need not be neighbours.
    private static func takeRuns(
        after first: BufferRun, from rest: inout ArraySlice<Placement.Write>,
        shorterThan limit: Int
    ) -> [BufferRun] {
        var runs = [first]
        var end = first.offset + Int64(first.parts[0].count)
        while let next = rest.first, case .plain(let positions) = next.bytes,
            positions.count < limit
        {
            rest.removeFirst()
            if next.hostOffset == end, runs[runs.count - 1].parts.count <= mostParts {
                runs[runs.count - 1].parts.append(positions)
            } else {
                runs.append(BufferRun(offset: next.hostOffset, parts: [positions]))
            }
            end = next.hostOffset + Int64(positions.count)
        }
        return runs
    }

    /// Shares the parts that are long enough and can be shared. Writes the bytes between them in
    /// one piece each.
    private func writePlain(
        _ positions: Range<Int>, of data: RawSpan, at hostOffset: Int64, _ origin: BufferOrigin
    ) async throws {
        let toHost = hostOffset - Int64(positions.lowerBound)
        var position = positions.lowerBound
        // Start of the bytes before `position` that have to be written.
        var unwritten = position
        while position < positions.upperBound, sharesBlocks,
            let (holder, host) = origin.location(of: position..<positions.upperBound)
        {
            let count = host.count
            if count >= Self.shortestShared {
                let shared = Int(share(host, of: holder, at: toHost + Int64(position)))
                if shared > 0 {
                    try await writePart(unwritten..<position, of: data, toHost)
                    unwritten = position + shared
                }
            }
            position += count
        }
        try await writePart(unwritten..<positions.upperBound, of: data, toHost)
    }

    private func writePart(
        _ positions: Range<Int>, of data: RawSpan, _ toHost: Int64
    ) async throws {
        guard !positions.isEmpty else { return }
        try await write(data.extracting(positions), at: toHost + Int64(positions.lowerBound))
    }
}
