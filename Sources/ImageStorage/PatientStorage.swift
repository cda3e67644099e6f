import Concurrency
import DiskImage

/// A storage that is read although parts of it are damaged: where it cannot tell what is a hole, it
/// calls it data, and reading shows what is there.
public final class PatientStorage: Storage {
    /// Length in bytes of what counts as data after one failure.
    private static let unit: Int64 = 1 << 20

    private let storage: any Storage

    public init(_ storage: any Storage) { self.storage = storage }

    public var name: String { storage.name }
    public var size: Int64 { storage.size }
    public var traits: StorageTraits { storage.traits }
    public var file: FileIdentity? { storage.file }
    public var allocatedSize: Int64? { storage.allocatedSize }
    public var readMeter: CallMeter { storage.readMeter }
    public var streamProgress: StreamProgress? { storage.streamProgress }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        try await storage.read(into: &buffer, at: offset)
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        do {
            return try await storage.extent(at: offset, limit: limit)
        } catch let error as ImageError where error.isAboutPlace {
            let end = min(limit, (offset + 1).roundedUp(to: Self.unit))
            return Extent(range: offset..<end, isHole: false)
        }
    }

    public func finishReading() async throws { try await storage.finishReading() }
}
