import DiskImage

/// A part of a guest disk, as a disk of its own.
public struct SliceSource: ImageSource {
    private let source: any ImageSource
    private let range: Range<Int64>

    /// - Parameter range: guest offsets in bytes, within the disk.
    public init(_ source: any ImageSource, _ range: Range<Int64>) {
        self.source = source
        self.range = range
    }

    public var virtualSize: Int64 { Int64(range.count) }
    public var layers: [any ImageLayer] { source.layers }

    public func mappings(
        at offset: Int64, limit: Int64, holes: HoleSearch
    ) async throws -> [Mapping] {
        let start = range.lowerBound
        return try await source.mappings(
            at: start + offset, limit: start + limit, holes: holes
        ).map { $0.moved(by: -start) }
    }
}

extension Mapping {
    /// Returns the same stretch as part of a larger disk.
    ///
    /// - Parameters:
    ///   - distance: offset in bytes of the mapping's disk on the larger disk.
    ///   - firstLayer: index of the first layer of the mapping's disk.
    func moved(by distance: Int64, firstLayer: Int = 0) -> Mapping {
        var result = self
        result.range = range.lowerBound + distance..<range.upperBound + distance
        result.layer += firstLayer
        return result
    }
}
