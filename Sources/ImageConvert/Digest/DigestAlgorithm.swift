import DiskImage

/// How the content of a disk becomes a number.
public enum DigestAlgorithm: String, CaseIterable, Sendable {
    /// SHA-256 of the SHA-256s of the blocks of 64 KiB and of the length, as `blksum` and
    /// `nbdcopy --blkhash` have it. Blocks are hashed beside each other, and those of zeros need
    /// not be looked at.
    case blkhash
    /// SHA-256 of the disk as a raw image, as `sha256sum` has it: one byte after the other.
    case sha256
}

/// The digest of a guest disk. It does not depend on the image's format, sparseness and
/// compression.
public struct DiskDigest: Sendable, Equatable, CustomStringConvertible {
    public let algorithm: DigestAlgorithm
    /// 64 digits, lower case.
    public let hexadecimal: String

    /// - Parameter text: as `description` has it, or the digits alone.
    /// - Returns: nil if it is neither, or has another algorithm than `algorithm` if that is given.
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
        hexadecimal = bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
    }

    /// The algorithm, a colon and the digits.
    public var description: String { "\(algorithm.rawValue):\(hexadecimal)" }
}

/// Takes the bytes of a disk, or of a part of it, in guest order.
protocol ByteSink: ~Copyable, Sendable {
    mutating func add(_ bytes: RawSpan) throws(ImageError)
    /// Adds zeros, which need not lie anywhere.
    mutating func addZeros(_ count: Int64) throws(ImageError)
}
