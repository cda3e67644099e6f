import DiskImage

/// A guest disk that holds only zeros.
public struct ZeroSource: ImageSource {
    public let virtualSize: Int64
    public var layers: [any ImageLayer] { [] }

    public init(virtualSize: Int64) { self.virtualSize = virtualSize }

    public func mappings(at offset: Int64, limit: Int64, holes: HoleSearch) -> [Mapping] {
        [Mapping(offset..<limit, .zero)]
    }
}
