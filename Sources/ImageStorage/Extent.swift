import DiskImage

/// A stretch of a storage that holds data, or is a hole.
public struct Extent: Sendable, Equatable {
    /// In bytes; empty only at the end of an open-ended storage.
    public var range: Range<Int64>
    /// Whether nothing is stored here, so that it reads as zeros. Data can be all zeros, too.
    public var isHole: Bool
    /// The content that `map` shows instead of data, because the server was asked for another
    /// context than that of holes; nil mostly.
    public var shown: Mapping.Content?

    public init(range: Range<Int64>, isHole: Bool) {
        self.range = range
        self.isHole = isHole
    }
}
