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

    init?(headerNumber: UInt8) {
        switch headerNumber {
        case 0: self = .zlib
        case 1: self = .zstd
        default: return nil
        }
    }

    var headerNumber: UInt8 {
        switch self {
        case .zlib: 0
        case .zstd: 1
        }
    }
}
