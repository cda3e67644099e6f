/// Finds zeros in bytes, with the only loop of a plain conversion that looks at every byte.
public enum ZeroScan {
    /// Number of bytes that are looked at between two decisions.
    private static let step = 256

    /// Whether all bytes are zero; true for an empty span.
    public static func isZero(_ bytes: RawSpan) -> Bool {
        isZero(bytes, 0..<bytes.byteCount)
    }

    public static func isZero(_ bytes: RawSpan, _ range: Range<Int>) -> Bool {
        precondition(range.lowerBound >= 0 && range.upperBound <= bytes.byteCount)
        var position = range.lowerBound
        let end = range.upperBound
        // Data mostly differs from zero in its first bytes: one look can save the wide loop.
        if end - position >= 8 {
            guard bytes.unsafeLoadUnaligned(fromUncheckedByteOffset: position, as: UInt64.self) == 0
            else { return false }
        }
        while end - position >= step {
            // The compiler turns single words in a loop of fixed length into a wide loop without
            // branches, but SIMD types that are compared with zero into a branch for each register.
            var any: UInt64 = 0
            for word in 0..<step / 8 {
                any |= bytes.unsafeLoadUnaligned(
                    fromUncheckedByteOffset: position &+ 8 &* word, as: UInt64.self)
            }
            guard any == 0 else { return false }
            position += step
        }
        while end - position >= 8 {
            guard bytes.unsafeLoadUnaligned(fromUncheckedByteOffset: position, as: UInt64.self) == 0
            else { return false }
            position += 8
        }
        while position < end {
            guard bytes.unsafeLoad(fromUncheckedByteOffset: position, as: UInt8.self) == 0
            else { return false }
            position += 1
        }
        return true
    }

    /// Calls `body` for each run of zeros or data in `range`, front to back, without gaps.
    ///
    /// - Parameters:
    ///   - unit: length of a unit in bytes; a unit is zero if all its bytes are. Units are counted
    ///     from the start of `range`, and the last one may be shorter.
    ///   - minimum: length in bytes below which a run of zeros counts as data. A run that covers
    ///     the whole range is zero whatever its length, as in qemu-img.
    public static func forEachRun(
        in bytes: RawSpan, _ range: Range<Int>, unit: Int, minimum: Int,
        _ body: (_ run: Range<Int>, _ isZero: Bool) -> Void
    ) {
        var dataStart = range.lowerBound
        var position = range.lowerBound
        while position < range.upperBound {
            let zeroStart = position
            position = endOfZeros(bytes, from: zeroStart, to: range.upperBound, unit: unit)
            if position - zeroStart >= min(minimum, range.count), position > zeroStart {
                if dataStart < zeroStart { body(dataStart..<zeroStart, false) }
                body(zeroStart..<position, true)
                dataStart = position
            }
            // The unit that ended the zeros is data.
            position = min(position + unit, range.upperBound)
        }
        if dataStart < range.upperBound { body(dataStart..<range.upperBound, false) }
    }

    private static func endOfZeros(_ bytes: RawSpan, from start: Int, to end: Int, unit: Int) -> Int
    {
        var position = start
        while position < end {
            let next = min(position + unit, end)
            guard isZero(bytes, position..<next) else { break }
            position = next
        }
        return position
    }
}
