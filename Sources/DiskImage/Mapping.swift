/// A stretch of a guest disk: its content, as far as metadata can tell, and the place of its bytes.
///
/// Conversions, `map`, `compare` and `measure` all work from mappings. `read` takes the mappings
/// that were found, so an image's tables are walked once.
public struct Mapping: Sendable, Equatable {
    public enum Content: Sendable, Equatable {
        /// Bytes stored as they are. They have to be read to be known, and may all be zeros.
        case data
        /// Bytes stored encrypted, like data. No other image could use them where they are.
        case encrypted
        /// A compressed cluster, or a part of one.
        case compressed
        /// Zeros, because the image's tables say so.
        case zero
        /// Zeros, because a raw image has a hole.
        case hole
        /// Zeros, because the place of an allocated cluster is a hole of the file, or lies behind
        /// the end of a file that ends within the cluster.
        case preallocated
        /// Left to the image below; zeros if there is none.
        case unallocated
        /// Data that an export's metadata marks (`x-dirty-bitmap`). Only `map` and `measure` get
        /// to see it: in the mappings that are asked for to read by, it is data.
        case marked
        /// An allocated cluster wholly behind the end of the file: zeros to qemu, an error to
        /// `read`, because no way of making images leaves such a cluster.
        case missing
    }

    /// Guest offsets in bytes; never empty.
    public var range: Range<Int64>
    public var content: Content
    /// The place of the bytes in the storage of the layer, as long as `range`; for a compressed
    /// cluster that of its whole stream, or of as many bytes as the stream can have. nil if there
    /// is no place. Zeros and unallocated clusters can have one, too.
    public var host: Range<Int64>?
    /// Index into the source's `layers`.
    public var layer = 0
    /// Offset of the first byte on the guest disk of that layer, in bytes.
    public var layerOffset: Int64

    /// - Parameters:
    ///   - range: guest offsets in bytes.
    ///   - hostOffset: the place of the first byte, if the bytes are stored unchanged.
    public init(_ range: Range<Int64>, _ content: Content, hostOffset: Int64? = nil) {
        self.range = range
        self.content = content
        host = hostOffset.map { $0..<$0 + Int64(range.count) }
        layerOffset = range.lowerBound
    }

    /// Whether the layer has to be read: for the bytes, or for the error that they are missing. All
    /// else is zeros.
    public var needsReading: Bool {
        switch content {
        case .data, .encrypted, .compressed, .marked, .missing: true
        case .zero, .hole, .preallocated, .unallocated: false
        }
    }

    /// A part of the stretch, with its place.
    ///
    /// - Parameter part: overlaps `range`.
    public func clipped(to part: Range<Int64>) -> Mapping {
        var result = self
        result.range = range.clamped(to: part)
        let skipped = result.range.lowerBound - range.lowerBound
        result.layerOffset += skipped
        if content != .compressed, let host {
            let start = host.lowerBound + skipped
            result.host = start..<start + Int64(result.range.count)
        }
        return result
    }

    /// Largest number of mappings in an answer, so that the first one comes soon.
    public static let mostAtOnce = 512
}

/// The effort to find holes of a file under the data of an image.
public enum HoleSearch: Sendable {
    /// Looks for every hole: known zeros need not be read.
    case thorough
    /// Looks where qemu does for `map`, `measure` and `compare -s`: in raw images, and in images
    /// that allocate clusters ahead of their data.
    case asQemu
}
