import DiskImage

/// One refcount block in memory: the reference counts of consecutive host clusters, as big-endian
/// numbers, or as parts of a byte with the lowest bits first.
///
/// Source: QEMU's docs/interop/qcow2.txt, section "Host cluster management".
struct RefcountBlock: Sendable {
    /// Width of a count in bits, a power of two from 1 to 64.
    let bits: Int
    /// A cluster of counts; empty for counts of zero that cannot be changed.
    private(set) var bytes: [UInt8]

    init(bits: Int, bytes: [UInt8]) {
        self.bits = bits
        self.bytes = bytes
    }

    /// A block of zeros.
    init(bits: Int, byteCount: Int) {
        self.init(bits: bits, bytes: [UInt8](repeating: 0, count: byteCount))
    }

    /// A block of a file without holes, in which every cluster has one reference.
    ///
    /// - Parameters:
    ///   - byteCount: size of a cluster in bytes.
    ///   - number: index of the block in the refcount table.
    ///   - clusters: number of clusters of the file.
    init(bits: Int, byteCount: Int, number: Int64, ofImageWith clusters: Int64) {
        self.init(bits: bits, byteCount: byteCount)
        let used = min(Int64(count), clusters - number * Int64(count))
        for index in 0..<Int(used) { self[index] = 1 }
    }

    /// Number of clusters that a block of this length counts.
    static func count<Size: FixedWidthInteger>(bits: Int, byteCount: Size) -> Size {
        byteCount * 8 / Size(bits)
    }

    /// The largest count.
    static func maximum(bits: Int) -> UInt64 { bits == 64 ? .max : (1 << UInt64(bits)) - 1 }

    var count: Int { Self.count(bits: bits, byteCount: bytes.count) }
    var maximum: UInt64 { Self.maximum(bits: bits) }

    /// The count of a cluster, by its place in the block.
    subscript(index: Int) -> UInt64 {
        get {
            if bytes.isEmpty { return 0 }
            let block = bytes.span.bytes
            return switch bits {
            case 8: UInt64(block.unsafeLoad(fromByteOffset: index, as: UInt8.self))
            case 16: UInt64(block.bigEndian(at: index * 2, as: UInt16.self))
            case 32: UInt64(block.bigEndian(at: index * 4, as: UInt32.self))
            case 64: block.bigEndian(at: index * 8, as: UInt64.self)
            default: UInt64(bytes[index * bits / 8] >> UInt8(index * bits % 8)) & maximum
            }
        }
        set {
            precondition(newValue <= maximum)
            guard bits < 8 else {
                let size = bits / 8
                for byte in 0..<size {
                    bytes[index * size + byte] = UInt8(
                        truncatingIfNeeded: newValue >> UInt64(8 * (size - 1 - byte)))
                }
                return
            }
            let shift = UInt8(index * bits % 8)
            let byte = index * bits / 8
            bytes[byte] = bytes[byte] & ~(UInt8(maximum) << shift) | UInt8(newValue) << shift
        }
    }

    /// The first free clusters of a range, at most `count` in a row; nil if all are in use.
    func firstFree(in range: Range<Int>, upTo count: Int) -> Range<Int>? {
        guard let first = range.first(where: { self[$0] == 0 }) else { return nil }
        let end = (first..<range.upperBound).first { $0 - first == count || self[$0] != 0 }
        return first..<(end ?? range.upperBound)
    }

    /// Number of the first counts that are not zero.
    func countUsed(first count: Int) -> Int64 {
        let block = bytes.span.bytes
        var result: Int64 = 0
        for index in 0..<min(count, self.count) {
            // The usual width comes first and needs no test for each count.
            let isUsed =
                bits == 16
                ? block.bigEndian(at: index * 2, as: UInt16.self) != 0 : self[index] != 0
            if isUsed { result += 1 }
        }
        return result
    }
}
