/// An object that holds bytes in blocks, some of which other objects may share, such as a file.
public protocol BlockHolder: AnyObject, Sendable {}

/// The places that the bytes of a buffer were read from, so that a target can share their blocks
/// instead of writing them once more.
public struct BufferOrigin: Sendable {
    private let layers: [any ImageLayer]
    private let mappings: [Mapping]
    /// Guest offset of the buffer's first byte, in bytes.
    private let start: Int64

    /// - Parameters:
    ///   - layers: of the source.
    ///   - mappings: of what was read, front to back.
    ///   - start: guest offset of the buffer's first byte, in bytes.
    public init(layers: [any ImageLayer], mappings: [Mapping], start: Int64) {
        self.layers = layers
        self.mappings = mappings
        self.start = start
    }

    /// The place of the bytes at these positions of the buffer, as far as it is in one piece.
    ///
    /// - Returns: nil if the first byte is not stored unchanged.
    public func location(
        of positions: Range<Int>
    ) -> (holder: any BlockHolder, host: Range<Int64>)? {
        let wanted = start + Int64(positions.lowerBound)..<start + Int64(positions.upperBound)
        guard let index = mappings.index(at: wanted.lowerBound) else { return nil }
        let mapping = mappings[index].clipped(to: wanted)
        guard mapping.content == .data, let host = mapping.host,
            let holder = layers[mapping.layer].holder
        else { return nil }
        return (holder, host)
    }
}

extension RandomAccessCollection<Mapping> where Index == Int {
    /// The index of the mapping that holds a guest offset; the mappings are in guest order.
    func index(at offset: Int64) -> Int? {
        var low = startIndex
        var high = endIndex
        while low < high {
            let middle = (low + high) / 2
            if self[middle].range.upperBound <= offset { low = middle + 1 } else { high = middle }
        }
        return low < endIndex && self[low].range.contains(offset) ? low : nil
    }
}
