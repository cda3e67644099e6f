import DiskImage
import ImageStorage

/// Several guest disks one behind the other, each padded with zeros to whole sectors, as qemu-img
/// joins its sources. One source alone is padded in the same way.
public struct ConcatenatedSource: ImageSource {
    private struct Part {
        var source: any ImageSource
        var start: Int64
        var end: Int64
    }

    private let parts: [Part]
    public let virtualSize: Int64
    public let readGranularity: Int64

    /// - Throws: `ImageError` if the sum of the sizes is beyond what can be counted.
    public init(_ sources: [any ImageSource]) throws(ImageError) {
        var parts: [Part] = []
        var end: Int64 = 0
        for source in sources {
            let size = source.virtualSize.roundedUp(to: guestSectorSize)
            let (sum, overflow) = end.addingReportingOverflow(size)
            guard !overflow, sum <= largestDiskSize else { throw .tooLarge("the sources together") }
            parts.append(Part(source: source, start: end, end: sum))
            end = sum
        }
        self.parts = parts
        virtualSize = end
        readGranularity = sources.map(\.readGranularity).max() ?? 1
    }

    public func isSparse() async throws -> Bool {
        for part in parts where try await !part.source.isSparse() { return false }
        return true
    }

    private func part(at offset: Int64) -> Part {
        // Few parts, many calls on the same one; offsets within the disk are a precondition.
        parts[parts.firstIndex { offset < $0.end } ?? parts.count - 1]
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        let part = part(at: offset)
        let local = offset - part.start
        guard local < part.source.virtualSize else {
            return Extent(range: offset..<min(limit, part.end), content: .zero)
        }
        let found = try await part.source.extent(
            at: local, limit: min(limit - part.start, part.source.virtualSize))
        return Extent(
            range: found.range.lowerBound + part.start..<found.range.upperBound + part.start,
            content: found.content)
    }

    public func location(at offset: Int64, limit: Int64) async throws -> HostLocation? {
        let part = part(at: offset)
        let local = offset - part.start
        guard local < part.source.virtualSize else { return nil }
        return try await part.source.location(
            at: local, limit: min(limit - part.start, part.source.virtualSize))
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        var done = 0
        while done < buffer.byteCount {
            let part = part(at: offset + Int64(done))
            let local = offset + Int64(done) - part.start
            let isPadding = local >= part.source.virtualSize
            let partEnd = isPadding ? part.end - part.start : part.source.virtualSize
            let count = Int(min(Int64(buffer.byteCount - done), partEnd - local))
            if isPadding {
                buffer.zeroFill(done..<done + count)
            } else {
                var slice = buffer.slice(done..<done + count)
                try await part.source.read(into: &slice, at: local)
            }
            done += count
        }
    }
}
