/// Finds zeros in bytes. The only loop of a plain conversion that looks at every byte.
public enum ZeroScan {
    /// How much is looked at between two decisions, in bytes.
    private static let step = 256

    /// Whether all bytes are zero; true for none at all.
    public static func isZero(_ bytes: RawSpan) -> Bool {
        isZero(bytes, 0..<bytes.byteCount)
    }

    public static func isZero(_ bytes: RawSpan, _ range: Range<Int>) -> Bool {
        precondition(range.lowerBound >= 0 && range.upperBound <= bytes.byteCount)
        var position = range.lowerBound
        let end = range.upperBound
        // Data mostly differs from zero within its first bytes: one look before the wide loop.
        if end - position >= 8 {
            guard bytes.unsafeLoadUnaligned(fromUncheckedByteOffset: position, as: UInt64.self) == 0
            else { return false }
        }
        while end - position >= step {
            // Single words in a loop of fixed length: the compiler makes a wide loop without branches of it, and of
            // SIMD types, compared with zero, one with a branch for each register.
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
    ///   - unit: in bytes; a unit counts as zero if all of it is. Units are counted from the start of
    ///     `range`, whose last one may be shorter.
    ///   - minimum: shorter runs of zeros count as data, in bytes. A run that reaches over the whole
    ///     range is zero whatever its length, as qemu-img has it.
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
            // What stopped the zeros is data.
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
