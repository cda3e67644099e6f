import DiskImage

/// A part of a guest disk, as a disk of its own.
public struct SliceSource: ImageSource {
    private let source: any ImageSource
    private let range: Range<Int64>

    /// - Parameter range: in bytes, within the disk.
    public init(_ source: any ImageSource, _ range: Range<Int64>) {
        self.source = source
        self.range = range
    }

    public var virtualSize: Int64 { Int64(range.count) }
    public var readGranularity: Int64 { source.readGranularity }

    public func isSparse() async throws -> Bool { try await source.isSparse() }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        let start = range.lowerBound
        let found = try await source.extent(at: start + offset, limit: start + limit)
        return Extent(
            range: found.range.lowerBound - start..<found.range.upperBound - start,
            content: found.content)
    }

    public func location(at offset: Int64, limit: Int64) async throws -> HostLocation? {
        try await source.location(
            at: range.lowerBound + offset, limit: range.lowerBound + limit)
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        try await source.read(into: &buffer, at: range.lowerBound + offset)
    }
}
