/// One refcount block in memory: the reference counts of consecutive host clusters.
struct Qcow2RefcountBlock: Sendable {
    private let codec: RefcountCodec
    private(set) var bytes: [UInt8]

    /// An empty block.
    init(bits: Int, byteCount: Int) {
        self.init(bits: bits, bytes: [UInt8](repeating: 0, count: byteCount))
    }

    /// - Parameter bits: of one count, a power of two from 1 to 64.
    init(bits: Int, bytes: [UInt8]) {
        codec = RefcountCodec(bits: bits)
        self.bytes = bytes
    }

    var bits: Int { codec.bits }

    /// How many clusters it counts.
    var count: Int { codec.entries(inBytes: Int64(bytes.count)) }

    /// The largest count.
    var maximum: UInt64 { codec.maximum }

    subscript(index: Int) -> UInt64 {
        get { codec.read(bytes.span.bytes, index) }
        set {
            precondition(newValue <= maximum)
            codec.write(newValue, into: &bytes, index)
        }
    }
}
