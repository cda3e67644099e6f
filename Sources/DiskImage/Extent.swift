/// The content of one range of a guest disk, as far as metadata can tell.
///
/// An extent is a hint that errs only in the harmless direction: `.data` may turn out to be zeros
/// when it is read, but `.zero` always reads as zeros.
public struct Extent: Sendable, Equatable {
    public enum Content: Sendable, Equatable {
        /// Bytes that have to be read to be known.
        case data
        /// Data in compressed clusters: reading takes longer than moving the bytes.
        case compressed
        /// Reads as zeros.
        case zero
        /// Not allocated in this layer: the backing file below decides (zeros if there is none).
        case backing
    }

    /// Guest offsets in bytes; never empty.
    public var range: Range<Int64>
    public var content: Content

    public init(range: Range<Int64>, content: Content) {
        self.range = range
        self.content = content
    }
}
