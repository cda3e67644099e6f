/// An object that holds bytes in blocks, some of which other objects may share, such as a file.
public protocol BlockHolder: AnyObject, Sendable {}

/// The place where a part of a guest disk is stored unchanged, byte for byte.
public struct HostLocation: Sendable {
    public var holder: any BlockHolder
    /// Bytes from the holder's start; never empty.
    public var range: Range<Int64>

    public init(holder: any BlockHolder, range: Range<Int64>) {
        self.holder = holder
        self.range = range
    }
}

/// The place that the bytes of a buffer were read from, so that a target can share their blocks
/// instead of writing them once more.
public struct BufferOrigin: Sendable {
    private let source: any ImageSource
    /// Guest offset of the buffer's first byte, in bytes.
    private let start: Int64

    public init(source: any ImageSource, start: Int64) {
        self.source = source
        self.start = start
    }

    /// The place of the bytes at these positions of the buffer, as far as it is in one piece; nil
    /// if the first byte is not stored unchanged.
    public func location(of positions: Range<Int>) async throws -> HostLocation? {
        let end = min(start + Int64(positions.upperBound), source.virtualSize)
        let offset = start + Int64(positions.lowerBound)
        return offset < end ? try await source.location(at: offset, limit: end) : nil
    }
}
