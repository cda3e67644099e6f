import DiskImage

/// A disk without the parts that another disk holds, too, as far as metadata can tell: these are
/// `.unallocated`. The bytes of the rest can still be equal.
public struct DifferenceSource: ImageSource {
    private let source: any ImageSource
    private let other: any ImageSource
    private let images: [Int?]
    private let otherImages: [Int?]

    /// - Parameters:
    ///   - other: at least as long as the source.
    ///   - images: a number for each layer of the source. Layers with the same number, here and in
    ///     `otherImages`, are one image; nil is an image of which that is not known.
    public init(
        _ source: any ImageSource, from other: any ImageSource, images: [Int?],
        otherImages: [Int?]
    ) {
        self.source = source
        self.other = other
        self.images = images
        self.otherImages = otherImages
    }

    public var virtualSize: Int64 { source.virtualSize }
    public var layers: [any ImageLayer] { source.layers }

    public func mappings(
        at offset: Int64, limit: Int64, holes: HoleSearch
    ) async throws -> [Mapping] {
        let own = try await source.mappings(at: offset, limit: limit, holes: holes)
        let end = own.last?.range.upperBound ?? offset
        var others = try await other.mappings(at: offset, limit: end, holes: holes)[...]
        var result: [Mapping] = []
        for mapping in own {
            var position = mapping.range.lowerBound
            while position < mapping.range.upperBound {
                guard let isSame = others.first.map({ isSame(mapping, $0, at: position) }) else {
                    return result
                }
                // Parts of one mapping stay together, because a compressed cluster is read whole.
                var partEnd = position
                while let next = others.first, partEnd < mapping.range.upperBound,
                    self.isSame(mapping, next, at: partEnd) == isSame
                {
                    partEnd = min(mapping.range.upperBound, next.range.upperBound)
                    if partEnd == next.range.upperBound { others.removeFirst() }
                }
                var part = mapping.clipped(to: position..<partEnd)
                if isSame { part.content = .unallocated }
                result.append(part)
                position = partEnd
            }
        }
        return result
    }

    /// Whether two mappings lead to the same bytes at a guest offset, in bytes, that both have.
    private func isSame(_ one: Mapping, _ other: Mapping, at offset: Int64) -> Bool {
        guard one.needsReading || other.needsReading else { return true }
        guard one.content == other.content, let image = images[one.layer],
            image == otherImages[other.layer]
        else { return false }
        let first = offset..<offset + 1
        let (here, there) = (one.clipped(to: first), other.clipped(to: first))
        return here.layerOffset == there.layerOffset
            && here.host?.lowerBound == there.host?.lowerBound && here.host != nil
    }
}
