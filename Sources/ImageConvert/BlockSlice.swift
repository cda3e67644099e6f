/// Which part of its source `dd` copies.
public struct BlockSlice: Sendable, Equatable {
    /// In bytes.
    public var blockSize: Int64 = 512
    /// In blocks from the start of the source, not from where the copying starts: so qemu-img has
    /// it. nil: all.
    public var count: Int64?
    /// Blocks that are left out at the start.
    public var skip: Int64 = 0

    public init() {}

    /// - Parameter size: of the source, in bytes.
    /// - Returns: nil if `skip` leads behind the end of what is to be copied.
    func range(of size: Int64) -> Range<Int64>? {
        let (counted, countOverflow) = (count ?? .max).multipliedReportingOverflow(by: blockSize)
        let end = countOverflow ? size : min(size, counted)
        let (start, skipOverflow) = skip.multipliedReportingOverflow(by: blockSize)
        return skipOverflow || start > end ? nil : start..<end
    }
}
