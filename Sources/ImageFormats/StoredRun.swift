import DiskImage
import ImageStorage

/// What one image stores of a stretch of its guest disk, and where: more than `Extent` tells, for those
/// who show an image to people instead of reading it.
public struct StoredRun: Sendable, Equatable {
    public enum Content: Sendable, Equatable {
        /// Left to the backing file.
        case unallocated
        /// Reads as zeros by the word of the image's tables.
        case zero
        /// Bytes as they are.
        case data
        /// Bytes as they are, in a place of the file that is a hole: they read as zeros.
        case preallocated
        /// In compressed clusters.
        case compressed
        /// A hole of a raw image.
        case hole
    }

    /// Guest offsets in bytes; never empty.
    public var range: Range<Int64>
    public var content: Content
    /// Where the first byte lies in the file, and the others behind it; nil if they have no such place.
    public var hostOffset: Int64?

    public init(range: Range<Int64>, content: Content, hostOffset: Int64? = nil) {
        self.range = range
        self.content = content
        self.hostOffset = hostOffset
    }
}

/// Tells the runs of one image. For one caller, who goes from front to back.
public protocol StoredRunReader: AnyObject {
    /// - Parameters:
    ///   - offset: a guest offset in bytes.
    ///   - limit: how far to look; at most the image's `guestSize`.
    /// - Returns: a run that starts at `offset` and ends at `limit` at the latest. The next one can be
    ///   of the same kind.
    /// - Throws: `ImageError` for damaged tables.
    func run(at offset: Int64, limit: Int64) async throws -> StoredRun
}

extension OpenedLayer {
    /// The size of the disk in bytes, in whole sectors, as qemu counts them: a raw file's last one is
    /// filled up with zeros, a part of a sector that a qcow2 header names is left out.
    public var guestSize: Int64 {
        switch format {
        case .raw: source.virtualSize.roundedUp(to: guestSectorSize)
        case .qcow2: source.virtualSize.roundedDown(to: guestSectorSize)
        }
    }

    public func storedRuns() -> any StoredRunReader {
        if let qcow2 { Qcow2RunReader(qcow2) } else { RawRunReader(storage) }
    }
}

/// The runs of a raw image: what the storage says of itself.
final class RawRunReader: StoredRunReader {
    private let allocation: StorageAllocation

    init(_ storage: any Storage) { allocation = StorageAllocation(storage) }

    func run(at offset: Int64, limit: Int64) async throws -> StoredRun {
        let found = try await allocation.extent(at: offset, limit: limit)
        return StoredRun(
            range: found.range, content: found.content == .zero ? .hole : .data,
            hostOffset: offset)
    }
}

/// Which parts of a storage are holes, by the most exact means there is.
final class StorageAllocation {
    private let storage: any Storage
    /// The last answer: callers ask for neighbours.
    private var last: Extent?

    init(_ storage: any Storage) { self.storage = storage }

    /// - Parameter limit: what lies beyond the storage's end up to there is a hole.
    func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        guard offset < storage.size else { return Extent(range: offset..<limit, content: .zero) }
        if let last, last.range.contains(offset) { return cut(last, offset, limit) }
        guard let file = storage as? FileStorage else {
            return try await storage.extent(at: offset, limit: min(limit, storage.size))
        }
        let found = file.allocation(at: offset)
        last = found
        return cut(found, offset, limit)
    }

    private func cut(_ extent: Extent, _ offset: Int64, _ limit: Int64) -> Extent {
        Extent(range: offset..<min(extent.range.upperBound, limit), content: extent.content)
    }
}
