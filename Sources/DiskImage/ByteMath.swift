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

    /// How many pieces of `size` cover this number.
    @inlinable
    public func dividedUp(by size: Self) -> Self { self / size + (self % size == 0 ? 0 : 1) }

    @inlinable
    public var isPowerOfTwo: Bool { self > 0 && self & (self - 1) == 0 }
}

/// The unit in which qemu counts guest disks: a disk's size is a multiple of it, in bytes.
public let guestSectorSize: Int64 = 512

/// Reads a size as qemu-img writes them: digits with one optional suffix (b, k, M, G, T, P, E;
/// powers of 1024, either case) and an optional decimal fraction (`1.5G`).
///
/// - Returns: bytes, or nil if the text is no size or does not fit.
public func parseByteSize(_ text: some StringProtocol) -> Int64? {
    let shifts: [Character: Int64] = [
        "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60,
    ]
    var digits = Substring(text)
    var shift: Int64 = 0
    if let last = digits.last, let known = shifts[Character(last.lowercased())] {
        shift = known
        digits.removeLast()
    }
    let parts = digits.split(separator: ".", omittingEmptySubsequences: false)
    guard (1...2).contains(parts.count), let first = parts.first, !first.isEmpty,
        parts.allSatisfy({ $0.allSatisfy { $0.isASCII && $0.isNumber } }),
        let whole = Int64(first)
    else { return nil }
    let (bytes, overflow) = whole.multipliedReportingOverflow(by: 1 << shift)
    guard !overflow else { return nil }
    guard parts.count == 2 else { return bytes }
    // A fraction of a byte means nothing.
    guard shift > 0, !parts[1].isEmpty, let fraction = Double("0.\(parts[1])") else { return nil }
    let (sum, sumOverflow) = bytes.addingReportingOverflow(
        Int64(fraction * Double(Int64(1) << shift)))
    return sumOverflow ? nil : sum
}
