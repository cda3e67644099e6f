import DiskImage

/// The disk of an image whose size is known only at its end, in whole sectors.
public struct OpenEndedSource: ImageSource {
    private let image: any Image

    public init(_ image: any Image) { self.image = image }

    public var virtualSize: Int64 { image.guestSize }
    public var layers: [any ImageLayer] { [image] }

    public func mappings(
        at offset: Int64, limit: Int64, holes: HoleSearch
    ) async throws -> [Mapping] {
        try await image.mappings(at: offset, limit: limit, holes: holes)
    }
}
