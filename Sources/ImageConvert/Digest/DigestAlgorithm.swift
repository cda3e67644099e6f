import DiskImage

/// A hash function over the content of a disk.
public enum DigestAlgorithm: String, CaseIterable, Sendable {
    /// SHA-256 over the SHA-256s of the 64 KiB blocks and the length, as computed by `blksum` and
    /// `nbdcopy --blkhash`. Blocks are hashed in parallel, and blocks of zeros need not be read.
    case blkhash
    /// SHA-256 over the bytes of the disk as a raw image, as computed by `sha256sum`.
    case sha256
}

/// The digest of a guest disk, independent of the image's format, sparseness and compression.
public struct DiskDigest: Sendable, Equatable, CustomStringConvertible {
    public let algorithm: DigestAlgorithm
    /// 64 lower-case digits.
    public let hexadecimal: String

    /// - Parameter text: the digits alone, or in the form of `description`.
    /// - Returns: nil if `text` is in neither form or names an algorithm other than a given
    ///   `algorithm`.
    public init?(_ text: String, algorithm: DigestAlgorithm?) {
        let parts = text.split(separator: ":", omittingEmptySubsequences: false)
        guard let digits = parts.last, parts.count <= 2, digits.utf8.count == 64,
            digits.allSatisfy({ $0.isASCII && $0.isHexDigit })
        else { return nil }
        if parts.count == 2 {
            guard let named = DigestAlgorithm(rawValue: String(parts[0])),
                named == algorithm ?? named
            else { return nil }
            self.algorithm = named
        } else {
            self.algorithm = algorithm ?? .blkhash
        }
        hexadecimal = digits.lowercased()
    }

    init(_ algorithm: DigestAlgorithm, _ bytes: [UInt8]) {
        self.algorithm = algorithm
        hexadecimal = bytes.hexadecimal
    }

    /// The algorithm, a colon and the digits.
    public var description: String { "\(algorithm.rawValue):\(hexadecimal)" }
}

extension [UInt8] {
    /// Two lower-case digits for each byte.
    var hexadecimal: String { map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined() }
}

/// A consumer of the bytes of a disk, or of a part of it, in guest order.
protocol ByteSink: ~Copyable, Sendable {
    mutating func add(_ bytes: RawSpan) throws
    /// Adds zeros without needing a buffer of them.
    mutating func addZeros(_ count: Int64) throws
}
