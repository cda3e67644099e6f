import DiskImage

extension WritableStorage {
    /// Writes zeros like data, so that they take up space.
    public func writeZeros(_ range: Range<Int64>) async throws {
        guard !range.isEmpty else { return }
        let pieceSize: Int64 = 1 << 20
        let zeros = try IOBuffer.zeros(byteCount: Int(min(pieceSize, Int64(range.count))))
        var offset = range.lowerBound
        while offset < range.upperBound {
            try Task.checkCancellation()
            // Cut at multiples of the piece size: direct writes stay aligned after an odd start.
            let end = min(range.upperBound, (offset + 1).roundedUp(to: pieceSize))
            try await write(zeros.bytes.extracting(0..<Int(end - offset)), at: offset)
            offset = end
        }
    }
}
