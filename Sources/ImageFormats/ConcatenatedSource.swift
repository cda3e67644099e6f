import DiskImage
import ImageStorage

/// Several guest disks joined one behind the other, each padded with zeros to whole sectors as in
/// qemu-img. A single source is padded, too.
public struct ConcatenatedSource: ImageSource {
    private struct Part {
        var source: any ImageSource
        var start: Int64
        var end: Int64
        var firstLayer: Int
    }

    private var parts: [Part] = []
    public private(set) var layers: [any ImageLayer] = []
    public private(set) var virtualSize: Int64 = 0

    /// - Throws: `ImageError` if the sum of the sizes exceeds `largestDiskSize`.
    public init(_ sources: [any ImageSource]) throws(ImageError) {
        for source in sources {
            let size = source.virtualSize.roundedUp(to: guestSectorSize)
            let start = virtualSize
            let (end, overflow) = start.addingReportingOverflow(size)
            guard !overflow, end <= largestDiskSize else { throw .tooLarge("the sources together") }
            parts.append(Part(source: source, start: start, end: end, firstLayer: layers.count))
            layers += source.layers
            virtualSize = end
        }
    }

    public func mappings(
        at offset: Int64, limit: Int64, holes: HoleSearch
    ) async throws -> [Mapping] {
        // A linear search suffices for few parts. An offset within the disk is a precondition.
        let part = parts[parts.firstIndex { offset < $0.end } ?? parts.count - 1]
        let local = offset - part.start
        guard local < part.source.virtualSize else {
            return [Mapping(offset..<min(limit, part.end), .zero)]
        }
        return try await part.source.mappings(
            at: local, limit: min(limit - part.start, part.source.virtualSize), holes: holes
        ).map { $0.moved(by: part.start, firstLayer: part.firstLayer) }
    }
}
