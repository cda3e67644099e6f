import DiskImage

/// A guest disk from some offset on.
public struct TailSource: ImageSource {
    private let source: any ImageSource
    private let start: Int64

    /// - Parameter start: in bytes, within the disk.
    public init(_ source: any ImageSource, from start: Int64) {
        self.source = source
        self.start = start
    }

    public var virtualSize: Int64 { source.virtualSize - start }
    public var readGranularity: Int64 { source.readGranularity }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        let found = try await source.extent(at: start + offset, limit: start + limit)
        return Extent(
            range: found.range.lowerBound - start..<found.range.upperBound - start,
            content: found.content)
    }

    public func location(at offset: Int64, limit: Int64) async throws -> HostLocation? {
        try await source.location(at: start + offset, limit: start + limit)
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        try await source.read(into: &buffer, at: start + offset)
    }
}
