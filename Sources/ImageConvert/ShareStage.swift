import DiskImage

/// The second and third stage in one, where nothing has to be read: lets the target take over the
/// blocks that hold the source's bytes, and says what has to be copied after all, like any other
/// data.
struct ShareStage: Sendable {
    let source: any ImageSource
    let target: any ImageTarget
    /// Ranges without a place of their own on the source's host are left over in pieces of this
    /// many bytes.
    private static let step: Int64 = 1 << 20

    /// - Returns: what could not be shared, front to back.
    func share(_ chunk: Chunk) async throws -> [Range<Int64>] {
        var left: [Range<Int64>] = []
        for segment in chunk.segments {
            var position = segment.range.lowerBound
            while position < segment.range.upperBound {
                let end = try await sharePiece(position, segment.range.upperBound, &left)
                position = end
            }
        }
        return left
    }

    /// Shares what lies in one piece of the source's host.
    ///
    /// - Returns: the end of what was shared or is left to copy.
    private func sharePiece(
        _ start: Int64, _ end: Int64, _ left: inout [Range<Int64>]
    ) async throws -> Int64 {
        guard target.sharesUnread else {
            leave(start..<end, to: &left)
            return end
        }
        guard let location = try await source.location(at: start, limit: end) else {
            let next = min(end, (start + 1).roundedUp(to: Self.step))
            leave(start..<next, to: &left)
            return next
        }
        let locationEnd = start + Int64(location.range.count)
        leave(start + target.share(location, at: start)..<locationEnd, to: &left)
        return locationEnd
    }

    private func leave(_ range: Range<Int64>, to left: inout [Range<Int64>]) {
        guard !range.isEmpty else { return }
        if let last = left.last, last.upperBound == range.lowerBound {
            left[left.count - 1] = last.lowerBound..<range.upperBound
        } else {
            left.append(range)
        }
    }
}
