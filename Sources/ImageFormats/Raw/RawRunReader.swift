import DiskImage
import ImageStorage

/// The runs of a raw image: what the storage says of itself.
final class RawRunReader: StoredRunReader {
    private let allocation: StorageAllocation

    init(_ storage: any Storage) { allocation = StorageAllocation(storage) }

    func run(at offset: Int64, limit: Int64) -> StoredRun? {
        allocation.extent(at: offset, limit: limit).map {
            StoredRun(
                range: $0.range, content: $0.content == .zero ? .hole : .data, hostOffset: offset)
        }
    }

    func load(at offset: Int64, limit: Int64) async throws {
        try await allocation.load(at: offset, limit: limit)
    }
}
