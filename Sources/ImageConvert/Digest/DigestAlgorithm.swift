import DiskImage

/// How the content of a disk becomes a number.
public enum DigestAlgorithm: String, CaseIterable, Sendable {
    /// SHA-256 of the SHA-256s of the blocks of 64 KiB and of the length, as `blksum` and `nbdcopy --blkhash` have it:
    /// blocks are hashed beside each other, and those of zeros need not be looked at.
    case blkhash
    /// What `sha256sum` says of the disk as a raw image: one byte after the other.
    case sha256
}

/// The digest of a guest disk: the same whatever the image's format, sparseness and compression.
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

/// A hash of a part of a disk in the making. Bytes come in guest order.
protocol DiskHash: ~Copyable, Sendable {
    mutating func add(_ bytes: RawSpan) throws(ImageError)
    /// The same for zeros, which need not be anywhere.
    mutating func addZeros(_ count: Int64) throws(ImageError)
}

extension SHA256: DiskHash {
    mutating func add(_ bytes: RawSpan) throws(ImageError) { try update(bytes) }
    mutating func addZeros(_ count: Int64) throws(ImageError) { try updateZeros(count) }
}
