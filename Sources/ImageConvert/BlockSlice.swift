/// The part of its source that `dd` copies.
public struct BlockSlice: Sendable, Equatable {
    /// Length of a block in bytes.
    public var blockSize: Int64 = 512
    /// End of the part in blocks, counted from the start of the source and not of the part, as in
    /// qemu-img; nil copies to the end.
    public var count: Int64?
    /// Number of blocks that are left out at the start.
    public var skip: Int64 = 0

    public init() {}

    /// - Parameter size: size of the source in bytes.
    /// - Returns: nil if `skip` leads behind the end of the part.
    func range(of size: Int64) -> Range<Int64>? {
        let (counted, countOverflow) = (count ?? .max).multipliedReportingOverflow(by: blockSize)
        let end = countOverflow ? size : min(size, counted)
        let (start, skipOverflow) = skip.multipliedReportingOverflow(by: blockSize)
        return skipOverflow || start > end ? nil : start..<end
    }
}
