/// A stretch of a storage that holds data, or is a hole.
public struct Extent: Sendable, Equatable {
    /// In bytes; empty only at the end of an open-ended storage.
    public var range: Range<Int64>
    /// Whether nothing is stored here, so that it reads as zeros. Data can be all zeros, too.
    public var isHole: Bool

    public init(range: Range<Int64>, isHole: Bool) {
        self.range = range
        self.isHole = isHole
    }
}
