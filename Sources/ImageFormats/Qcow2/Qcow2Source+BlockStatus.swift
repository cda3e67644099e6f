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
            return try await preallocatedStatus(run.range, host, status.union(.preallocated))
        }
    }

    private func preallocatedStatus(
        _ range: Range<Int64>, _ host: HostOffset, _ status: BlockStatus
    ) async throws -> (range: Range<Int64>, status: BlockStatus) {
        let size = storage.size
        let isCut =
            host.bytes + Int64(range.count) > size
            && host.bytes + Int64(range.count) > size.roundedUp(to: readGranularity)
        let zero: BlockStatus = isCut ? [.zero, .missing] : .zero
        guard host.bytes < size else { return (range, status.union(zero)) }
        let below = try await storage.extent(
            at: host.bytes, limit: min(host.bytes + Int64(range.count), storage.size))
        guard below.content == .zero else {
            return (range.lowerBound..<range.lowerBound + Int64(below.range.count), status)
        }
        // A hole at the end of the file goes on behind it.
        if below.range.upperBound == size { return (range, status.union(zero)) }
        return (
            range.lowerBound..<range.lowerBound + Int64(below.range.count), status.union(.zero)
        )
    }
}
