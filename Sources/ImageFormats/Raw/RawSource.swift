import DiskImage
import ImageStorage

/// A raw image: the storage holds the guest disk byte for byte.
public struct RawSource: Image {
    public let storage: any Storage

    public init(_ storage: any Storage) { self.storage = storage }

    public var isOpenEnded: Bool { storage.traits.isOpenEnded }
    public var virtualSize: Int64 { storage.size }
    /// Size in whole sectors; zeros fill the sector in which the file ends.
    public var guestSize: Int64 { storage.size.roundedUp(to: guestSectorSize) }

    /// - Parameter limit: at most `guestSize`.
    /// - Returns: one mapping, because searching for more takes long on storages with latency.
    public func mappings(
        at offset: Int64, limit: Int64, holes: HoleSearch
    ) async throws -> [Mapping] {
        guard offset < storage.size else {
            return [Mapping(offset..<limit, .hole, hostOffset: offset)]
        }
        let extent = try await storage.extent(at: offset, limit: min(limit, storage.size))
        // An open-ended storage has found its end.
        guard !extent.range.isEmpty else {
            return [Mapping(offset..<limit, .hole, hostOffset: offset)]
        }
        if holes == .asQemu, let shown = extent.shown {
            return [Mapping(extent.range, shown, hostOffset: offset)]
        }
        return [Mapping(extent.range, extent.isHole ? .hole : .data, hostOffset: offset)]
    }
}
