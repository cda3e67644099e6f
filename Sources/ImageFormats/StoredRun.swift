import DiskImage
import ImageStorage

/// A stretch of guest disk as one image stores it, and its place: more than `Extent` tells, for
/// those who show an image to people instead of reading it.
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
    /// Where the first byte lies in the file, and the others behind it; nil if they have no such
    /// place.
    public var hostOffset: Int64?

    public init(range: Range<Int64>, content: Content, hostOffset: Int64? = nil) {
        self.range = range
        self.content = content
        self.hostOffset = hostOffset
    }
}

/// Tells the runs of one image. For one caller, who goes from front to back.
///
/// Asking and reading are apart, because an asynchronous call for each run would take longer than
/// all else: an image can have millions of runs, and one read brings thousands of them.
public protocol StoredRunReader: AnyObject {
    /// - Parameters:
    ///   - offset: a guest offset in bytes.
    ///   - limit: how far to look; at most the image's `guestSize`.
    /// - Returns: a run that starts at `offset` and ends at `limit` at the latest. The next one can
    ///   be of the same kind. nil if `load` has to be called first.
    /// - Throws: `ImageError` for damaged tables.
    func run(at offset: Int64, limit: Int64) throws -> StoredRun?

    /// Reads what it takes to tell the run at an offset; parameters as of `run`.
    func load(at offset: Int64, limit: Int64) async throws
}

/// Which parts of a storage are holes, by the most exact means there is.
final class StorageAllocation {
    private let storage: any Storage
    /// The last answer: callers ask for neighbours.
    private var last: Extent?

    init(_ storage: any Storage) { self.storage = storage }

    /// - Parameter limit: what lies beyond the storage's end up to there is a hole.
    /// - Returns: nil if `load` has to be called first; never for a file.
    func extent(at offset: Int64, limit: Int64) -> Extent? {
        guard offset < storage.size else { return Extent(range: offset..<limit, content: .zero) }
        if last?.range.contains(offset) != true, let found = storage.allocation(at: offset) {
            last = found
        }
        guard let last, last.range.contains(offset) else { return nil }
        return Extent(range: offset..<min(last.range.upperBound, limit), content: last.content)
    }

    func load(at offset: Int64, limit: Int64) async throws {
        last = try await storage.extent(at: offset, limit: min(limit, storage.size))
    }
}
