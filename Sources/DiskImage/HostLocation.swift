/// A place that holds bytes in blocks, some of which it may share with another: a file.
public protocol BlockHolder: AnyObject, Sendable {}

/// Where a part of a guest disk lies as it is, byte for byte.
public struct HostLocation: Sendable {
    public var holder: any BlockHolder
    /// In bytes from the holder's start; never empty.
    public var range: Range<Int64>

    public init(holder: any BlockHolder, range: Range<Int64>) {
        self.holder = holder
        self.range = range
    }
}

/// Where the bytes of a buffer were read from, so that a target can share the blocks they lie in
/// instead of writing them once more.
public struct BufferOrigin: Sendable {
    private let source: any ImageSource
    /// What the first byte of the buffer is on the guest disk.
    private let start: Int64

    public init(source: any ImageSource, start: Int64) {
        self.source = source
        self.start = start
    }

    /// Where the bytes at these positions of the buffer lie, as far as they do in one piece; nil if the
    /// first of them lies nowhere as it is.
    public func location(of positions: Range<Int>) async throws -> HostLocation? {
        let end = min(start + Int64(positions.upperBound), source.virtualSize)
        let offset = start + Int64(positions.lowerBound)
        return offset < end ? try await source.location(at: offset, limit: end) : nil
    }
}
