import DiskImage

/// An image and all that lies below it, as the guest sees them together.
public struct LayeredSource: ImageSource {
    private struct Part {
        var source: any ImageSource
        /// In bytes.
        var size: Int64
        var firstLayer: Int
    }

    /// From the image itself down to its base; never empty.
    private let parts: [Part]
    private let sizeBelow: Int64
    public let layers: [any ImageLayer]

    /// - Parameters:
    ///   - sources: from the image itself down to its base; not empty.
    ///   - sizeBelow: of a disk that lies below these layers, in bytes. What none of them holds is
    ///     `.unallocated` as far as that disk reaches, and `.zero` behind its end, or where there
    ///     is none. A source with a disk below is good for its mappings only. `.max` leaves
    ///     everything `.unallocated`.
    public init(layers sources: [any ImageSource], sizeBelow: Int64 = 0) {
        self.init(sources.map { ($0, $0.virtualSize) }, sizeBelow: sizeBelow)
    }

    /// The disk as `map` shows it: what no image holds is `.unallocated`.
    ///
    /// - Parameter images: each as long as its `guestSize`.
    public init(wholeSectorsOf images: [any Image]) {
        self.init(images.map { ($0, $0.guestSize) }, sizeBelow: .max)
    }

    private init(_ sources: [(any ImageSource, size: Int64)], sizeBelow: Int64) {
        precondition(!sources.isEmpty)
        var parts: [Part] = []
        var layers: [any ImageLayer] = []
        for (source, size) in sources {
            parts.append(Part(source: source, size: size, firstLayer: layers.count))
            layers += source.layers
        }
        self.parts = parts
        self.layers = layers
        self.sizeBelow = sizeBelow
    }

    public var virtualSize: Int64 { parts[0].size }

    /// What no image holds has the layer of the last one that reaches so far.
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

    /// Adds what the images below hold of a stretch, all of it or until it is enough for one
    /// answer.
    private func append(
        _ mapping: Mapping, below depth: Int, _ holes: HoleSearch, to result: inout [Mapping]
    ) async throws {
        let end = mapping.range.upperBound
        var position = mapping.range.lowerBound
        while position < end {
            // A backing file may be shorter than what lies on it: nothing follows.
            guard depth + 1 < parts.count, position < parts[depth + 1].size else {
                return append(mapping.clipped(to: position..<end), to: &result)
            }
            result += try await mappings(from: depth + 1, at: position, limit: end, holes)
            position = result[result.count - 1].range.upperBound
            if result.count >= Mapping.mostAtOnce { return }
        }
    }

    /// Adds what no image holds.
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
