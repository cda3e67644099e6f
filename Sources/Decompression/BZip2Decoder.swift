import CBZip2

/// Decodes bzip2 with libbz2.
final class BZip2Decoder: StreamDecoder {
    private var stream = bz_stream()

    /// The reason why libbz2 cannot be used, or nil; the first access loads it.
    private static let problem: String? = cbzip2_load().map { String(cString: $0) }

    init() throws(DecodingError) {
        if let problem = Self.problem {
            throw .noLibrary("bzip2 needs the library libbz2 (Debian: libbz2-1.0): \(problem)")
        }
        try begin()
    }

    deinit { _ = cbzip2_loaded().pointee.DecompressEnd(&stream) }

    private func begin() throws(DecodingError) {
        stream = bz_stream()
        guard cbzip2_loaded().pointee.DecompressInit(&stream, 0, 0) == BZ_OK else {
            throw .outOfMemory
        }
    }

    func restart() throws(DecodingError) {
        _ = cbzip2_loaded().pointee.DecompressEnd(&stream)
        try begin()
    }

    func decode(
        _ input: UnsafeRawBufferPointer, isLast: Bool,
        into output: UnsafeMutableRawBufferPointer
    ) throws(DecodingError) -> DecodingStep {
        stream.next_in = UnsafeMutablePointer(
            mutating: input.baseAddress?.assumingMemoryBound(to: CChar.self))
        stream.avail_in = UInt32(input.count)
        stream.next_out = output.baseAddress?.assumingMemoryBound(to: CChar.self)
        stream.avail_out = UInt32(output.count)
        let result = cbzip2_loaded().pointee.Decompress(&stream)
        switch result {
        case BZ_OK, BZ_STREAM_END: break
        case BZ_MEM_ERROR: throw .outOfMemory
        default: throw .damaged
        }
        return DecodingStep(
            taken: input.count - Int(stream.avail_in), made: output.count - Int(stream.avail_out),
            isEnd: result == BZ_STREAM_END)
    }
}
