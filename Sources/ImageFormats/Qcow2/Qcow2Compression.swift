/// The method by which an image compresses all its clusters.
public enum Qcow2Compression: String, Sendable, CaseIterable {
    case zlib
    case zstd

    /// Allowed values of `compression_level`: low is fast, high makes short streams.
    public var levels: ClosedRange<Int> {
        switch self {
        case .zlib: 1...9
        case .zstd: 1...22
        }
    }

    /// The number of the method in headers.
    var headerNumber: UInt8 {
        switch self {
        case .zlib: 0
        case .zstd: 1
        }
    }
}
