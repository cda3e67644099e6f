import DiskImage

/// A guest disk of nothing but zeros.
public struct ZeroSource: ImageSource {
    public let virtualSize: Int64
    public var readGranularity: Int64 { 1 }

    public init(virtualSize: Int64) { self.virtualSize = virtualSize }

    public func isSparse() -> Bool { true }

    public func extent(at offset: Int64, limit: Int64) -> Extent {
        Extent(range: offset..<limit, content: .zero)
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) {
        buffer.zeroFill()
    }
}
