/// Finds where bytes differ, in sectors: the unit in which qemu-img reports differences.
public enum ByteComparison {
    /// Eight words, which the compiler keeps in vector registers.
    private typealias Lane = SIMD8<UInt64>
    private static let laneSize = MemoryLayout<Lane>.size
    private static let sectorSize = Int(guestSectorSize)

    /// Finds the first sector in which two equally long spans differ.
    ///
    /// - Returns: start of the sector in bytes from the start of the spans; nil if they are equal.
    public static func firstDifference(_ one: RawSpan, _ other: RawSpan) -> Int? {
        precondition(one.byteCount == other.byteCount)
        let end = one.byteCount
        var position = 0
        while end - position >= 4 * laneSize {
            let any =
                difference(one, other, position) | difference(one, other, position + laneSize)
                | difference(one, other, position + 2 * laneSize)
                | difference(one, other, position + 3 * laneSize)
            guard any == .zero else { return position.roundedDown(to: sectorSize) }
            position += 4 * laneSize
        }
        while position < end {
            guard
                one.unsafeLoad(fromUncheckedByteOffset: position, as: UInt8.self)
                    == other.unsafeLoad(fromUncheckedByteOffset: position, as: UInt8.self)
            else { return position.roundedDown(to: sectorSize) }
            position += 1
        }
        return nil
    }

    /// The start in bytes of the first sector that is not all zeros; nil if every byte is zero.
    public static func firstNonzero(_ bytes: RawSpan) -> Int? {
        if ZeroScan.isZero(bytes) { return nil }
        return stride(from: 0, to: bytes.byteCount, by: sectorSize).first {
            !ZeroScan.isZero(bytes, $0..<min($0 + sectorSize, bytes.byteCount))
        }
    }

    @inline(__always)
    private static func difference(_ one: RawSpan, _ other: RawSpan, _ position: Int) -> Lane {
        one.unsafeLoadUnaligned(fromUncheckedByteOffset: position, as: Lane.self)
            ^ other.unsafeLoadUnaligned(fromUncheckedByteOffset: position, as: Lane.self)
    }
}
