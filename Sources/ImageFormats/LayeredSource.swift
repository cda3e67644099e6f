import DiskImage

/// An image and all that lies below it, as the guest sees them together.
public struct LayeredSource: ImageSource {
    /// From the image itself down to its base; never empty.
    private let layers: [any ImageSource]
    private let sizeBelow: Int64

    /// - Parameter sizeBelow: of a disk that lies below these layers, in bytes. What none of them
    ///   holds is `.backing` as far as that disk reaches, and `.zero` behind its end, or where
    ///   there is none. A source with a disk below is good for its extents only.
    public init(layers: [any ImageSource], sizeBelow: Int64 = 0) {
        precondition(!layers.isEmpty)
        self.layers = layers
        self.sizeBelow = sizeBelow
    }

    public var virtualSize: Int64 { layers[0].virtualSize }
    public var readGranularity: Int64 { layers.map(\.readGranularity).max() ?? 1 }

    public func isSparse() async throws -> Bool {
        for layer in layers where try await !layer.isSparse() { return false }
        return true
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        let found = try await find(at: offset, limit: limit)
        return Extent(range: found.range, content: found.content)
    }

    /// Looks downwards for the first layer that knows what it has at `offset`.
    ///
    /// - Returns: the layer that holds data there, nil where there is none.
    private func find(
        at offset: Int64, limit: Int64
    ) async throws -> (range: Range<Int64>, content: Extent.Content, layer: Int?) {
        var limit = limit
        for (index, layer) in layers.enumerated() {
            // A backing file may be shorter than what lies on it: zeros follow.
            guard offset < layer.virtualSize else { return (offset..<limit, .zero, nil) }
            let extent = try await layer.extent(
                at: offset, limit: min(limit, layer.virtualSize))
            limit = extent.range.upperBound
            switch extent.content {
            case .data, .compressed: return (extent.range, extent.content, index)
            case .zero: return (extent.range, .zero, nil)
            case .backing: continue
            }
        }
        guard offset < sizeBelow else { return (offset..<limit, .zero, nil) }
        return (offset..<min(limit, sizeBelow), .backing, nil)
    }

    public func location(at offset: Int64, limit: Int64) async throws -> HostLocation? {
        var limit = limit
        for layer in layers {
            guard offset < layer.virtualSize else { return nil }
            let end = min(limit, layer.virtualSize)
            // Not by way of `find`: a layer would walk over all the data that follows, for every
            // piece.
            if let found = try await layer.location(at: offset, limit: end) { return found }
            let extent = try await layer.extent(at: offset, limit: end)
            guard extent.content == .backing else { return nil }
            limit = extent.range.upperBound
        }
        return nil
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        if layers.count == 1 { return try await layers[0].read(into: &buffer, at: offset) }
        let end = offset + Int64(buffer.byteCount)
        var position = offset
        while position < end {
            let found = try await find(at: position, limit: end)
            let place =
                Int(found.range.lowerBound - offset)..<Int(found.range.upperBound - offset)
            if let layer = found.layer {
                var part = buffer.slice(place)
                try await layers[layer].read(into: &part, at: position)
            } else {
                buffer.zeroFill(place)
            }
            position = found.range.upperBound
        }
    }
}
