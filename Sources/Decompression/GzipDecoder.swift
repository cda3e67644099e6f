import CISAL

/// Decodes gzip with ISA-L.
final class GzipDecoder: StreamDecoder {
    private let state: UnsafeMutablePointer<inflate_state>

    init() {
        state = .allocate(capacity: 1)
        isal_inflate_init(state)
        state.pointee.crc_flag = UInt32(ISAL_GZIP)
    }

    deinit { state.deallocate() }

    func decode(
        _ input: UnsafeRawBufferPointer, isLast: Bool,
        into output: UnsafeMutableRawBufferPointer
    ) throws(DecodingError) -> DecodingStep {
        state.pointee.next_in = UnsafeMutablePointer(
            mutating: input.baseAddress?.assumingMemoryBound(to: UInt8.self))
        state.pointee.avail_in = UInt32(input.count)
        state.pointee.next_out = output.baseAddress?.assumingMemoryBound(to: UInt8.self)
        state.pointee.avail_out = UInt32(output.count)
        guard isal_inflate(state) == ISAL_DECOMP_OK else { throw .damaged }
        return DecodingStep(
            taken: input.count - Int(state.pointee.avail_in),
            made: output.count - Int(state.pointee.avail_out),
            isEnd: state.pointee.block_state == ISAL_BLOCK_FINISH)
    }

    func restart() {
        isal_inflate_reset(state)
        state.pointee.crc_flag = UInt32(ISAL_GZIP)
    }
}
