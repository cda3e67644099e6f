import DiskImage
import ImageStorage

/// A raw image: the guest disk is what the storage holds, byte for byte.
public struct RawSource: Image {
    public let storage: any Storage

    public init(_ storage: any Storage) { self.storage = storage }

    public var virtualSize: Int64 { storage.size }
    /// A sector that the file ends in is filled up with zeros.
    public var guestSize: Int64 { storage.size.roundedUp(to: guestSectorSize) }
    public var readGranularity: Int64 { 1 }

    public func isSparse() -> Bool { storage.traits.hasHoles }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        try await storage.extent(at: offset, limit: limit)
    }

    public func storedRuns() -> any StoredRunReader { RawRunReader(storage) }

    public func location(at offset: Int64, limit: Int64) async throws -> HostLocation? {
        HostLocation(holder: storage, range: offset..<limit)
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        try await storage.read(into: &buffer, at: offset)
    }
}
