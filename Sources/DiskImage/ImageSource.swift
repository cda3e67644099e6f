/// A guest disk that can be read: a sequence of `virtualSize` bytes, whatever the format.
///
/// Calls may come from many tasks at once.
public protocol ImageSource: Sendable {
    /// The size of the guest disk in bytes.
    var virtualSize: Int64 { get }

    /// The size in bytes of the units that can only be read whole, a power of two: the cluster size
    /// of an image with compressed clusters, 1 if every byte can be read alone. Reads that are cut
    /// at its multiples decompress nothing twice.
    var readGranularity: Int64 { get }

    /// The content of the disk from `offset` on.
    ///
    /// - Parameter limit: end of the search in bytes; `0 <= offset < limit <= virtualSize`.
    /// - Returns: an extent that starts at `offset` and ends at `limit` at the latest. It may end
    ///   before the content does: the next extent can then be of an equal kind.
    func extent(at offset: Int64, limit: Int64) async throws -> Extent

    /// The place where the bytes from `offset` on are stored unchanged, not compressed or made up.
    ///
    /// - Parameter limit: end of the search in bytes; `0 <= offset < limit <= virtualSize`.
    /// - Returns: a location as long as the bytes lie in one piece, up to `limit`; nil if the byte
    ///   at `offset` is not stored unchanged.
    func location(at offset: Int64, limit: Int64) async throws -> HostLocation?

    /// Whether the files of the disk have holes where its data could be, so that zeros have already
    /// been left out.
    func isSparse() async throws -> Bool

    /// Fills the buffer with the guest's bytes from `offset` on; the range lies within the disk.
    func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws
}

extension ImageSource {
    public func isSparse() async throws -> Bool { false }

    public func location(at offset: Int64, limit: Int64) async throws -> HostLocation? { nil }
}
