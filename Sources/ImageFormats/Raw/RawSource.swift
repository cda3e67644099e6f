import DiskImage
import ImageStorage

/// A raw image: the guest disk is what the storage holds, byte for byte.
public struct RawSource: Image {
    public let storage: any Storage

    public init(_ storage: any Storage) { self.storage = storage }

    public var virtualSize: Int64 { storage.size }
    /// A sector that the file ends in is filled up with zeros.
    public var guestSize: Int64 { storage.size.roundedUp(to: guestSectorSize) }

    /// - Parameter limit: `guestSize` at most.
    /// - Returns: one mapping, because storages with latency take long to look for many.
    public func mappings(
        at offset: Int64, limit: Int64, holes: HoleSearch
    ) async throws -> [Mapping] {
        guard offset < storage.size else {
            return [Mapping(offset..<limit, .hole, hostOffset: offset)]
        }
        let extent = try await storage.extent(at: offset, limit: min(limit, storage.size))
        return [Mapping(extent.range, extent.isHole ? .hole : .data, hostOffset: offset)]
    }
}
