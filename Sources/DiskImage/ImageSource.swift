/// A guest disk to read: a sequence of `virtualSize` bytes whatever the format.
///
/// Calls may come from many tasks at once.
public protocol ImageSource: Sendable {
    /// The size of the guest disk in bytes.
    var virtualSize: Int64 { get }

    /// The size in bytes of the pieces that can only be read whole, a power of two: the cluster size
    /// of an image with compressed clusters, 1 where every byte can be read alone. Reads cut at its
    /// multiples decompress nothing twice.
    var readGranularity: Int64 { get }

    /// What the disk holds from `offset` on.
    ///
    /// - Parameter limit: how far to look, in bytes; `0 <= offset < limit <= virtualSize`.
    /// - Returns: an extent that starts at `offset` and ends at `limit` at the latest. It may be
    ///   shorter than the content is: the next one can then be of the same kind.
    func extent(at offset: Int64, limit: Int64) async throws -> Extent

    /// Where the bytes from `offset` on lie as they are: neither compressed nor made up.
    ///
    /// - Parameter limit: how far to look, in bytes; `0 <= offset < limit <= virtualSize`.
    /// - Returns: a location that is as long as what lies there in one piece, up to `limit`; nil if the
    ///   byte at `offset` has none.
    func location(at offset: Int64, limit: Int64) async throws -> HostLocation?

    /// Whether the files that hold the disk have holes where its data could be: zeros have been
    /// left out already.
    func isSparse() async throws -> Bool

    /// Fills the whole buffer with the guest's bytes from `offset` on; the range lies within the disk.
    func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws
}

extension ImageSource {
    public func isSparse() async throws -> Bool { false }

    public func location(at offset: Int64, limit: Int64) async throws -> HostLocation? { nil }
}
