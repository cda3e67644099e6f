import DiskImage
import ImageStorage

extension Storage {
    func write(_ bytes: [UInt8], at offset: Int64) async throws {
        let span = bytes.span.bytes
        try await write(span, at: offset)
    }

    /// Writes what a target has placed, out of a chunk's two buffers. Shares blocks with the data's
    /// origin where it can.
    func write(
        _ placement: Placement, data: RawSpan, encoded: RawSpan, origin: BufferOrigin? = nil
    ) async throws {
        for write in placement.writes {
            switch write.bytes {
            case .plain(let positions):
                try await writePlain(positions, of: data, at: write.hostOffset, origin)
            case .compressed(let positions):
                try await self.write(encoded.extracting(positions), at: write.hostOffset)
            case .metadata(let table):
                try await self.write(table, at: write.hostOffset)
            case .zeros(let length):
                try await zero(write.hostOffset..<write.hostOffset + length, mayUnmap: true)
            }
        }
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
