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
    /// A number that has more than 63 bits.
    case outOfRange
    case malformed

    /// Reads a size as qemu-img does: decimal digits with an optional fraction (`1.5G`), or
    /// hexadecimal digits after `0x`, and one optional suffix (b, k, M, G, T, P, E; powers of 1024,
    /// either case).
    public init(_ text: some StringProtocol) {
        let number = Substring(text).withoutLeadingSpaces
        self = Self.unsigned(number.first == "+" ? number.dropFirst() : number)
    }

    private static let shifts: [Character: Int64] = [
        "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60,
    ]

    private static func unsigned(_ text: Substring) -> ByteSizeText {
        var digits = text.prefix { $0.isASCII && $0.isNumber }
        var radix = 10
        var rest = text[digits.endIndex...]
        var fraction = 0.0
        if digits == "0", rest.first == "x" || rest.first == "X" {
            digits = rest.dropFirst().prefix { $0.isASCII && $0.isHexDigit }
            radix = 16
            rest = text[digits.endIndex...]
        } else if rest.first == "." {
            let decimals = rest.dropFirst().prefix { $0.isASCII && $0.isNumber }
            fraction = Double("0.\(decimals)0") ?? 0
            rest = text[decimals.endIndex...]
        }
        guard !digits.isEmpty, rest.count <= 1 else { return .malformed }
        let suffix = rest.first.map { Character($0.lowercased()) } ?? "b"
        // A fraction of a byte is meaningless.
        guard let shift = shifts[suffix], shift > 0 || fraction == 0 else { return .malformed }
        guard let whole = Int64(digits, radix: radix) else { return .outOfRange }
        let (bytes, overflow) = whole.multipliedReportingOverflow(by: 1 << shift)
        let (sum, sumOverflow) = bytes.addingReportingOverflow(
            Int64((fraction * Double(Int64(1) << shift)).rounded()))
        return overflow || sumOverflow ? .outOfRange : .bytes(sum)
    }
}

extension Int64 {
    /// Reads a size in bytes; nil if the text is not a size or the size does not fit.
    public init?(byteSize text: some StringProtocol) {
        guard case .bytes(let bytes) = ByteSizeText(text) else { return nil }
        self = bytes
    }

    /// Reads a whole number as C's strtol does without a given base: after spaces and a sign, `0x`
    /// begins a hexadecimal number and `0` an octal one. nil if the text is none or it does not
    /// fit.
    public init?(asInC text: some StringProtocol) {
        var digits = Substring(text).withoutLeadingSpaces
        let sign = digits.first.flatMap { $0 == "-" || $0 == "+" ? digits.removeFirst() : nil }
        var radix = 10
        if digits.hasPrefix("0x") || digits.hasPrefix("0X") {
            digits.removeFirst(2)
            radix = 16
        } else if digits.hasPrefix("0") {
            radix = 8
        }
        // `Int64` would take another sign.
        guard digits.first?.isHexDigit ?? false else { return nil }
        self.init((sign == "-" ? "-" : "") + digits, radix: radix)
    }
}

extension Substring {
    /// The text after what C's isspace takes for a space.
    fileprivate var withoutLeadingSpaces: Substring {
        drop { $0.isASCII && $0.isWhitespace }
    }
}
