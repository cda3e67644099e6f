import CXZ
import Glibc

/// Decodes xz with liblzma, on all cores if the file has several blocks.
final class XZDecoder: StreamDecoder {
    /// Limit in bytes for the memory of several threads. A file that needs more is decoded by one.
    private static let threadingMemory: UInt64 = 128 << 20

    private var stream = lzma_stream()

    /// The reason why liblzma cannot be used, or nil; the first access loads it.
    private static let problem: String? = cxz_load().map { String(cString: $0) }

    init() throws(DecodingError) {
        if let problem = Self.problem {
            throw .noLibrary("xz needs the library liblzma (Debian: liblzma5): \(problem)")
        }
        try restart()
    }

    deinit { cxz_loaded().pointee.end?(&stream) }

    func restart() throws(DecodingError) {
        let library = cxz_loaded().pointee
        let limit = UInt64(DecodingError.largestMemory)
        var options = lzma_mt()
        options.threads = UInt32(sysconf(Int32(_SC_NPROCESSORS_ONLN)))
        options.memlimit_threading = Self.threadingMemory
        options.memlimit_stop = limit
        let result =
            library.stream_decoder_mt.map { $0(&stream, &options) }
            ?? library.stream_decoder?(&stream, limit, 0)
        guard result == LZMA_OK else { throw .outOfMemory }
    }

    func decode(
        _ input: UnsafeRawBufferPointer, isLast: Bool,
        into output: UnsafeMutableRawBufferPointer
    ) throws(DecodingError) -> DecodingStep {
        stream.next_in = input.baseAddress?.assumingMemoryBound(to: UInt8.self)
        stream.avail_in = input.count
        stream.next_out = output.baseAddress?.assumingMemoryBound(to: UInt8.self)
        stream.avail_out = output.count
        let result = cxz_loaded().pointee.code?(&stream, isLast ? LZMA_FINISH : LZMA_RUN)
        switch result {
        // A call that can neither take nor make a byte; the caller sees that.
        case LZMA_OK, LZMA_STREAM_END, LZMA_BUF_ERROR: break
        case LZMA_MEM_ERROR: throw .outOfMemory
        case LZMA_MEMLIMIT_ERROR: throw .needsTooMuchMemory
        default: throw .damaged
        }
        return DecodingStep(
            taken: input.count - stream.avail_in, made: output.count - stream.avail_out,
            isEnd: result == LZMA_STREAM_END)
    }
}
