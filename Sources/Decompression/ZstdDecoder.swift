import CZstd

/// Decodes zstd with its own library.
final class ZstdDecoder: StreamDecoder {
    private let context: OpaquePointer

    init() throws(DecodingError) {
        guard let context = ZSTD_createDCtx() else { throw .outOfMemory }
        self.context = context
        let largestWindow = Int32(
            Int.bitWidth - 1 - DecodingError.largestMemory.leadingZeroBitCount)
        ZSTD_DCtx_setParameter(context, ZSTD_d_windowLogMax, largestWindow)
    }

    deinit { ZSTD_freeDCtx(context) }

    func decode(
        _ input: UnsafeRawBufferPointer, isLast: Bool,
        into output: UnsafeMutableRawBufferPointer
    ) throws(DecodingError) -> DecodingStep {
        var source = ZSTD_inBuffer(src: input.baseAddress, size: input.count, pos: 0)
        var room = ZSTD_outBuffer(dst: output.baseAddress, size: output.count, pos: 0)
        let result = ZSTD_decompressStream(context, &room, &source)
        guard ZSTD_isError(result) == 0 else {
            switch ZSTD_getErrorCode(result) {
            case ZSTD_error_memory_allocation: throw .outOfMemory
            case ZSTD_error_frameParameter_windowTooLarge: throw .needsTooMuchMemory
            default: throw .damaged
            }
        }
        return DecodingStep(taken: source.pos, made: room.pos, isEnd: result == 0)
    }

    func restart() { ZSTD_DCtx_reset(context, ZSTD_reset_session_only) }
}
