extension FixedWidthInteger {
    /// The largest multiple of `alignment` that is no larger than this number.
    @inlinable
    public func roundedDown(to alignment: Self) -> Self { self - self % alignment }

    /// The smallest multiple of `alignment` that is no smaller than this number.
    @inlinable
    public func roundedUp(to alignment: Self) -> Self {
        let rest = self % alignment
        return rest == 0 ? self : self + (alignment - rest)
    }

    /// The number of pieces of `size` that cover this number.
    @inlinable
    public func dividedUp(by size: Self) -> Self { self / size + (self % size == 0 ? 0 : 1) }

    @inlinable
    public var isPowerOfTwo: Bool { self > 0 && self & (self - 1) == 0 }
}

/// The unit in bytes in which qemu counts guest disks: a disk's size is a multiple.
public let guestSectorSize: Int64 = 512

/// The largest guest disk, and the largest file or export that holds one, in bytes: qemu's limit,
/// 2^63 - 2^30. An offset in such a disk can be rounded up to a unit used here, or increased by up
/// to 1 GiB, without overflow.
public let largestDiskSize: Int64 = .max - (1 << 30) + 1

/// The result of reading a text as a size.
public enum ByteSizeText: Sendable, Equatable {
    case bytes(Int64)
    /// A number that is negative or has more than 63 bits.
    case outOfRange
    case malformed

    /// Reads a size as qemu-img writes it: digits with one optional suffix (b, k, M, G, T, P, E;
    /// powers of 1024, either case) and an optional decimal fraction (`1.5G`), or hexadecimal
    /// digits after `0x`.
    public init(_ text: some StringProtocol) {
        let number = text.drop { $0 == " " || $0 == "\t" || $0 == "\n" }
        if number.hasPrefix("-") {
            let size = ByteSizeText(number.dropFirst())
            self =
                switch size {
                case .bytes(0), .malformed: size
                default: .outOfRange
                }
        } else {
            self = Self.unsigned(Substring(number.hasPrefix("+") ? number.dropFirst() : number))
        }
    }

    private static func unsigned(_ text: Substring) -> ByteSizeText {
        if text.lowercased().hasPrefix("0x") { return hexadecimal(text.dropFirst(2)) }
        let shifts: [Character: Int64] = [
            "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60,
        ]
        var digits = text
        var shift: Int64 = 0
        if let last = digits.last, let known = shifts[Character(last.lowercased())] {
            shift = known
            digits.removeLast()
        }
        let parts = digits.split(separator: ".", omittingEmptySubsequences: false)
        guard (1...2).contains(parts.count), !parts[0].isEmpty,
            parts.allSatisfy({ $0.allSatisfy { $0.isASCII && $0.isNumber } })
        else { return .malformed }
        var fraction = 0.0
        if parts.count == 2 {
            // A fraction of a byte is meaningless.
            guard shift > 0, !parts[1].isEmpty, let value = Double("0.\(parts[1])") else {
                return .malformed
            }
            fraction = value
        }
        guard let whole = Int64(parts[0]) else { return .outOfRange }
        let (bytes, overflow) = whole.multipliedReportingOverflow(by: 1 << shift)
        let (sum, sumOverflow) = bytes.addingReportingOverflow(
            Int64(fraction * Double(Int64(1) << shift)))
        return overflow || sumOverflow ? .outOfRange : .bytes(sum)
    }

    private static func hexadecimal(_ digits: Substring) -> ByteSizeText {
        guard !digits.isEmpty, digits.allSatisfy({ $0.isASCII && $0.isHexDigit }) else {
            return .malformed
        }
        return Int64(digits, radix: 16).map { .bytes($0) } ?? .outOfRange
    }
}

/// Reads a size in bytes; nil if the text is not a size or the size does not fit.
public func parseByteSize(_ text: some StringProtocol) -> Int64? {
    guard case .bytes(let bytes) = ByteSizeText(text) else { return nil }
    return bytes
}
