/// Finds zeros in bytes. The only loop of a plain conversion that looks at every byte.
public enum ZeroScan {
    /// Eight words, which the compiler keeps in vector registers.
    private typealias Lane = SIMD8<UInt64>
    private static let laneSize = MemoryLayout<Lane>.size

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
        while end - position >= 4 * laneSize {
            let any =
                lane(bytes, position) | lane(bytes, position + laneSize)
                | lane(bytes, position + 2 * laneSize) | lane(bytes, position + 3 * laneSize)
            guard any == .zero else { return false }
            position += 4 * laneSize
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

    @inline(__always)
    private static func lane(_ bytes: RawSpan, _ position: Int) -> Lane {
        bytes.unsafeLoadUnaligned(fromUncheckedByteOffset: position, as: Lane.self)
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
