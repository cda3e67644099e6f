/// One refcount block in memory: the reference counts of consecutive host clusters.
///
/// Source: QEMU's docs/interop/qcow2.txt, section "Host cluster management". Counts of less than a
/// byte begin at a byte's lowest bit, longer ones are big-endian.
struct Qcow2RefcountBlock: Sendable {
    /// Of one count: a power of two, 1 to 64.
    let bits: Int
    private(set) var bytes: [UInt8]

    /// An empty block.
    init(bits: Int, byteCount: Int) {
        self.init(bits: bits, bytes: [UInt8](repeating: 0, count: byteCount))
    }

    init(bits: Int, bytes: [UInt8]) {
        self.bits = bits
        self.bytes = bytes
    }

    /// How many clusters it counts.
    var count: Int { bytes.count * 8 / bits }

    /// The largest count.
    var maximum: UInt64 { Self.maximum(bits: bits) }

    static func maximum(bits: Int) -> UInt64 { bits == 64 ? .max : (1 << UInt64(bits)) - 1 }

    subscript(index: Int) -> UInt64 {
        get {
            if bits < 8 {
                let shift = index * bits % 8
                return UInt64(bytes[index * bits / 8] >> UInt8(shift)) & maximum
            }
            let length = bits / 8
            var value: UInt64 = 0
            for place in index * length..<(index + 1) * length {
                value = value << 8 | UInt64(bytes[place])
            }
            return value
        }
        set {
            precondition(newValue <= maximum)
            if bits < 8 {
                let shift = UInt8(index * bits % 8)
                let position = index * bits / 8
                bytes[position] &= ~(UInt8(maximum) << shift)
                bytes[position] |= UInt8(newValue) << shift
                return
            }
            let length = bits / 8
            for place in 0..<length {
                bytes[index * length + place] = UInt8(
                    truncatingIfNeeded: newValue >> UInt64(8 * (length - 1 - place)))
            }
        }
    }
}
