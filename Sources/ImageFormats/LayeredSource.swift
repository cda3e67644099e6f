import DiskImage

/// An image and all images below it as the one disk that the guest sees.
public struct LayeredSource: ImageSource {
    private struct Part {
        var source: any ImageSource
        /// Size of the source in bytes.
        var size: Int64
        var firstLayer: Int
    }

    /// The image itself first, its base last; never empty.
    private var parts: [Part] = []
    private let sizeBelow: Int64
    public private(set) var layers: [any ImageLayer] = []

    /// - Parameters:
    ///   - sources: the image itself first, its base last; not empty.
    ///   - sizeBelow: size in bytes of a disk below these layers; 0 if there is none. Ranges that
    ///     no layer holds are `.unallocated` up to this size and `.zero` behind it. With a disk
    ///     below, only the mappings of this source may be used: its reads do not include that disk.
    ///     `.max` leaves everything `.unallocated`.
    public init(layers sources: [any ImageSource], sizeBelow: Int64 = 0) {
        self.init(sources.map { ($0, $0.virtualSize) }, sizeBelow: sizeBelow)
    }

    /// The disk as `map` shows it: ranges that no image holds are `.unallocated`.
    ///
    /// - Parameter images: the image itself first; each is as long as its `guestSize`.
    public init(wholeSectorsOf images: [any Image]) {
        self.init(images.map { ($0, $0.guestSize) }, sizeBelow: .max)
    }

    private init(_ sources: [(any ImageSource, size: Int64)], sizeBelow: Int64) {
        precondition(!sources.isEmpty)
        self.sizeBelow = sizeBelow
        for (source, size) in sources {
            parts.append(Part(source: source, size: size, firstLayer: layers.count))
            layers += source.layers
        }
    }

    public var virtualSize: Int64 { parts[0].size }

    /// A range that no image holds has the layer of the last image that reaches so far.
    public func mappings(
        at offset: Int64, limit: Int64, holes: HoleSearch
    ) async throws -> [Mapping] {
        try await mappings(from: 0, at: offset, limit: limit, holes)
    }

    private func mappings(
        from depth: Int, at offset: Int64, limit: Int64, _ holes: HoleSearch
    ) async throws -> [Mapping] {
        let part = parts[depth]
        let found = try await part.source.mappings(
            at: offset, limit: min(limit, part.size), holes: holes)
        if parts.count == 1, sizeBelow == .max { return found }
        var result: [Mapping] = []
        result.reserveCapacity(found.count)
        for mapping in found {
            let mapping = mapping.moved(by: 0, firstLayer: part.firstLayer)
            if mapping.content == .unallocated {
                try await append(mapping, below: depth, holes, to: &result)
                if result[result.count - 1].range.upperBound < mapping.range.upperBound { break }
            } else {
                result.append(mapping)
            }
        }
        return result
    }

    /// Adds the mappings of the images below for an unallocated stretch, until the stretch ends or
    /// the answer is long enough.
    private func append(
        _ mapping: Mapping, below depth: Int, _ holes: HoleSearch, to result: inout [Mapping]
    ) async throws {
        let end = mapping.range.upperBound
        var position = mapping.range.lowerBound
        while position < end {
            // A backing file may be shorter than the image above it; behind its end there is
            // nothing.
            guard depth + 1 < parts.count, position < parts[depth + 1].size else {
                return append(mapping.clipped(to: position..<end), to: &result)
            }
            result += try await mappings(from: depth + 1, at: position, limit: end, holes)
            position = result[result.count - 1].range.upperBound
            if result.count >= Mapping.mostAtOnce { return }
        }
    }

    /// Adds a stretch that no image holds.
    private func append(_ mapping: Mapping, to result: inout [Mapping]) {
        if mapping.range.lowerBound < sizeBelow {
            result.append(mapping.clipped(to: 0..<sizeBelow))
        }
        if mapping.range.upperBound > sizeBelow {
            var zeros = mapping.clipped(to: sizeBelow..<mapping.range.upperBound)
            zeros.content = .zero
            result.append(zeros)
        }
    }
}
