/// A stretch of a storage that holds data, or is a hole.
public struct Extent: Sendable, Equatable {
    /// In bytes; never empty.
    public var range: Range<Int64>
    /// Nothing is stored: it reads as zeros. What is no hole may turn out to be zeros, too.
    public var isHole: Bool

    public init(range: Range<Int64>, isHole: Bool) {
        self.range = range
        self.isHole = isHole
    }
}
