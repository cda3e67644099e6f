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

    private let parts: [Part]
    public let layers: [any ImageLayer]
    public let virtualSize: Int64

    /// - Throws: `ImageError` if the sum of the sizes exceeds `largestDiskSize`.
    public init(_ sources: [any ImageSource]) throws(ImageError) {
        var parts: [Part] = []
        var layers: [any ImageLayer] = []
        var end: Int64 = 0
        for source in sources {
            let size = source.virtualSize.roundedUp(to: guestSectorSize)
            let (sum, overflow) = end.addingReportingOverflow(size)
            guard !overflow, sum <= largestDiskSize else { throw .tooLarge("the sources together") }
            parts.append(Part(source: source, start: end, end: sum, firstLayer: layers.count))
            layers += source.layers
            end = sum
        }
        self.parts = parts
        self.layers = layers
        virtualSize = end
    }

    private func part(at offset: Int64) -> Part {
        // A linear search suffices for few parts. An offset within the disk is a precondition.
        parts[parts.firstIndex { offset < $0.end } ?? parts.count - 1]
    }

    public func mappings(
        at offset: Int64, limit: Int64, holes: HoleSearch
    ) async throws -> [Mapping] {
        let part = part(at: offset)
        let local = offset - part.start
        guard local < part.source.virtualSize else {
            return [Mapping(offset..<min(limit, part.end), .zero)]
        }
        return try await part.source.mappings(
            at: local, limit: min(limit - part.start, part.source.virtualSize), holes: holes
        ).map { $0.moved(by: part.start, firstLayer: part.firstLayer) }
    }
}
