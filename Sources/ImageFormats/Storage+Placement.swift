import DiskImage
import ImageStorage

extension Storage {
    func write(_ bytes: [UInt8], at offset: Int64) async throws {
        let span = bytes.span.bytes
        try await write(span, at: offset)
    }

    /// Writes what a target has placed, out of a chunk's two buffers.
    func write(_ placement: Placement, data: RawSpan, encoded: RawSpan) async throws {
        for write in placement.writes {
            switch write.bytes {
            case .plain(let positions):
                try await self.write(data.extracting(positions), at: write.hostOffset)
            case .compressed(let positions):
                try await self.write(encoded.extracting(positions), at: write.hostOffset)
            case .metadata(let table):
                try await self.write(table, at: write.hostOffset)
            case .zeros(let length):
                try await zero(write.hostOffset..<write.hostOffset + length, mayUnmap: true)
            }
        }
    }
}
