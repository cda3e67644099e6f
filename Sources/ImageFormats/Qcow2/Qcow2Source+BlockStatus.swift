import DiskImage
import ImageStorage

extension Qcow2Source {
    /// Refcounts that cannot be read are no reason not to read the disk.
    public func isPreallocated() async throws -> Bool {
        do {
            return try await Qcow2Preallocation.isLikely(self)
        } catch is ImageError {
            return false
        }
    }

    public func blockStatus(
        at offset: Int64, limit: Int64, looksForHoles: Bool
    ) async throws -> (range: Range<Int64>, status: BlockStatus) {
        let run = try await tables.run(at: offset, limit: limit)
        switch run.mapping {
        case .unallocated: return (run.range, [])
        case .zero: return (run.range, [.zero, .allocated])
        case .compressed: return (run.range, [.data, .allocated])
        case .standard(let host):
            let status: BlockStatus = [.data, .allocated, .hasOffset]
            guard looksForHoles else { return (run.range, status) }
            let piece = try await hostPiece(at: host, count: Int64(run.range.count))
            let content: BlockStatus =
                switch piece.content {
                case .data: []
                case .hole: .zero
                case .missing: [.zero, .missing]
                }
            return (
                run.range.lowerBound..<run.range.lowerBound + piece.count,
                status.union(.preallocated).union(content)
            )
        }
    }
}
