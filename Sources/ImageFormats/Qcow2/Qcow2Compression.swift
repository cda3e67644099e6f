/// How an image compresses its clusters: one method for all of them.
public enum Qcow2Compression: String, Sendable, CaseIterable {
    case zlib
    case zstd

    /// What `compression_level` may be: low is fast, high is small.
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
