import DiskImage

/// The entries of refcount blocks: big-endian numbers, or parts of a byte with the lowest bits
/// first.
///
/// Source: QEMU's docs/interop/qcow2.txt, section "Host cluster management".
struct RefcountCodec: Sendable {
    /// A power of two from 1 to 64.
    let bits: Int

    func read(_ block: RawSpan, _ index: Int) -> UInt64 {
        switch bits {
        case 8: UInt64(block.unsafeLoad(fromByteOffset: index, as: UInt8.self))
        case 16: UInt64(block.bigEndian(at: index * 2, as: UInt16.self))
        case 32: UInt64(block.bigEndian(at: index * 4, as: UInt32.self))
        case 64: block.bigEndian(at: index * 8, as: UInt64.self)
        default:
            UInt64(
                block.unsafeLoad(fromByteOffset: index * bits / 8, as: UInt8.self)
                    >> UInt8(index * bits % 8)) & maximum
        }
    }

    /// - Parameter value: no larger than `bits` allow.
    func write(_ value: UInt64, into block: inout [UInt8], _ index: Int) {
        guard bits < 8 else {
            let size = bits / 8
            for byte in 0..<size {
                block[index * size + byte] = UInt8(
                    truncatingIfNeeded: value >> UInt64(8 * (size - 1 - byte)))
            }
            return
        }
        let shift = UInt8(index * bits % 8)
        let mask = UInt8((1 << bits) - 1)
        let byte = index * bits / 8
        block[byte] = block[byte] & ~(mask << shift) | (UInt8(value) & mask) << shift
    }

    /// The largest count.
    var maximum: UInt64 { bits == 64 ? .max : (1 << UInt64(bits)) - 1 }

    /// How many of the first entries of a block, which may be cut short, are not zero.
    func countUsed(in block: RawSpan, first count: Int) -> Int64 {
        let present = min(count, entries(inBytes: Int64(block.byteCount)))
        var result: Int64 = 0
        if bits == 16 {
            // The usual width, without a look at the width for each.
            for index in 0..<present where block.bigEndian(at: index * 2, as: UInt16.self) != 0 {
                result += 1
            }
        } else {
            for index in 0..<present where read(block, index) != 0 { result += 1 }
        }
        return result
    }

    /// How many clusters a block of so many bytes counts.
    func entries(inBytes size: Int64) -> Int { Int(size * 8) / bits }
}
