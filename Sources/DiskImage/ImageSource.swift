/// A guest disk that can be read: a sequence of `virtualSize` bytes, whatever the format.
///
/// A disk can consist of many images. It only tells where everything is; the images that hold the
/// bytes are its `layers`, which read them.
///
/// Calls may come from many tasks at once.
public protocol ImageSource: Sendable {
    /// The size of the guest disk in bytes; an upper bound for an open-ended disk until mappings
    /// were asked for up to its end.
    var virtualSize: Int64 { get }

    /// The images that the mappings lead to. The layer of a mapping is an index into this list.
    var layers: [any ImageLayer] { get }

    /// The content of the disk from `offset` on, and its places.
    ///
    /// - Parameter limit: end of the search in bytes; `0 <= offset < limit <= virtualSize`, or the
    ///   end of the last sector for an image that is asked in whole sectors.
    /// - Returns: at least one mapping. The first begins at `offset`, each other one where its
    ///   predecessor ends, and the last ends at `limit` at the latest. Neighbours can be alike.
    /// - Throws: `ImageError` for damaged tables, and where they cannot be read.
    func mappings(at offset: Int64, limit: Int64, holes: HoleSearch) async throws -> [Mapping]
}

/// An image that holds bytes of a guest disk.
public protocol ImageLayer: Sendable {
    /// The size in bytes of the units that can only be read whole, a power of two: the cluster size
    /// of an image with compressed clusters, 1 if every byte can be read alone. Reads that are cut
    /// at its multiples decompress nothing twice.
    var readGranularity: Int64 { get }

    /// The object whose blocks hold the data; nil if they cannot be shared.
    var holder: (any BlockHolder)? { get }

    /// Whether the file has holes where data could be, so that its data need not be searched for
    /// zeros.
    func isSparse() async throws -> Bool

    /// Reads the bytes that mappings lead to.
    ///
    /// - Parameters:
    ///   - mappings: contiguous stored stretches of this layer, found with `HoleSearch.thorough`;
    ///     never empty.
    ///   - buffer: as long as all of them.
    func read(_ mappings: ArraySlice<Mapping>, into buffer: inout MutableRawSpan) async throws
}

extension ImageSource {
    /// The largest granularity of the layers, in bytes.
    public var readGranularity: Int64 { layers.map(\.readGranularity).max() ?? 1 }

    public func isSparse() async throws -> Bool {
        for layer in layers where try await !layer.isSparse() { return false }
        return true
    }

    /// Fills the buffer with the guest's bytes from `offset` on; the range lies within the disk.
    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let end = offset + Int64(buffer.byteCount)
        var position = offset
        while position < end {
            let found = try await mappings(at: position, limit: end, holes: .thorough)
            let next = found[found.count - 1].range.upperBound
            var part = buffer.slice(Int(position - offset)..<Int(next - offset))
            try await read(found[...], into: &part)
            position = next
        }
    }

    /// Fills the buffer with the bytes of mappings that were found before.
    ///
    /// - Parameters:
    ///   - mappings: one behind the other, found with `HoleSearch.thorough`.
    ///   - buffer: as long as all of them.
    public func read(
        _ mappings: ArraySlice<Mapping>, into buffer: inout MutableRawSpan
    ) async throws {
        let start = mappings.first?.range.lowerBound ?? 0
        let layers = layers
        var rest = mappings
        while let first = rest.first {
            let needsReading = first.needsReading
            let run = rest.prefix {
                $0.needsReading == needsReading && ($0.layer == first.layer || !needsReading)
            }
            rest = rest[run.endIndex...]
            let end = run[run.endIndex - 1].range.upperBound
            let place = Int(first.range.lowerBound - start)..<Int(end - start)
            if needsReading {
                var part = buffer.slice(place)
                try await layers[first.layer].read(run, into: &part)
            } else {
                buffer.zeroFill(place)
            }
        }
    }
}
