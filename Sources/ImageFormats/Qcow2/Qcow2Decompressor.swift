import CDeflate
import CZlib
import CZstd
import DiskImage
import ImageStorage

/// Decompresses clusters. Used by one task at a time.
final class Qcow2Decompressor: @unchecked Sendable {
    enum Failure: Error, CustomStringConvertible {
        case damaged
        case tooShort
        case tooLong
        /// There is not enough memory, which says nothing about the stream.
        case noMemory

        var description: String {
            switch self {
            case .damaged: "the compressed data is damaged or cut short"
            case .tooShort: "it holds less than a cluster"
            case .tooLong: "it holds more than a cluster"
            case .noMemory: "out of memory"
            }
        }
    }

    private let method: Qcow2Compression
    private var deflate: OpaquePointer?
    private var zstd: OpaquePointer?

    /// - Throws: `ImageError` if there is not enough memory.
    init(_ method: Qcow2Compression) throws(ImageError) {
        self.method = method
        switch method {
        case .zlib: deflate = libdeflate_alloc_decompressor()
        case .zstd: zstd = ZSTD_createDCtx()
        }
        if deflate == nil, zstd == nil { throw .outOfMemory() }
    }

    deinit {
        libdeflate_free_decompressor(deflate)
        ZSTD_freeDCtx(zstd)
    }

    /// Fills `cluster` from a stream, which foreign bytes may follow.
    func decompress(_ stream: RawSpan, into cluster: inout MutableRawSpan) throws(Failure) {
        try stream.withUnsafeBytes { input throws(Failure) in
            try cluster.withUnsafeMutableBytes { output throws(Failure) in
                switch method {
                case .zlib: try inflate(input, output)
                case .zstd: try unzstd(input, output)
                }
            }
        }
    }

    /// Decompresses a deflate stream. libdeflate is twice as fast as zlib but accepts only a stream
    /// that yields exactly a cluster; zlib judges all others.
    private func inflate(
        _ input: UnsafeRawBufferPointer, _ output: UnsafeMutableRawBufferPointer
    ) throws(Failure) {
        var produced = 0
        let result = libdeflate_deflate_decompress(
            deflate, input.baseAddress, input.count, output.baseAddress, output.count, &produced)
        if result == LIBDEFLATE_SUCCESS, produced == output.count { return }
        try inflateByZlib(input, output)
    }

    /// Decompresses a deflate stream by zlib. As in qemu, a stream may yield more than a cluster. A
    /// stream that ends before its end mark was cut short, even if it fills the cluster: nothing
    /// proves that the bytes are right.
    private func inflateByZlib(
        _ input: UnsafeRawBufferPointer, _ output: UnsafeMutableRawBufferPointer
    ) throws(Failure) {
        var stream = z_stream()
        guard
            inflateInit2_(&stream, -15, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size)) == Z_OK
        else { throw .noMemory }
        defer { inflateEnd(&stream) }
        // zlib only reads through next_in: its interface is older than `const`.
        stream.next_in = UnsafeMutablePointer(
            mutating: input.baseAddress?.assumingMemoryBound(to: Bytef.self))
        stream.avail_in = uInt(input.count)
        stream.next_out = output.baseAddress?.assumingMemoryBound(to: Bytef.self)
        stream.avail_out = uInt(output.count)
        var status = CZlib.inflate(&stream, Z_FINISH)
        if status == Z_MEM_ERROR { throw .noMemory }
        guard stream.avail_out == 0 else {
            throw status == Z_STREAM_END ? .tooShort : .damaged
        }
        if status == Z_STREAM_END { return }
        // The cluster is full before the end mark: either more bytes or the mark must follow.
        var extra: Bytef = 0
        status = withUnsafeMutablePointer(to: &extra) { extra in
            stream.next_out = extra
            stream.avail_out = 1
            return CZlib.inflate(&stream, Z_SYNC_FLUSH)
        }
        if status == Z_MEM_ERROR { throw .noMemory }
        guard status == Z_STREAM_END || status == Z_OK && stream.avail_out == 0 else {
            throw .damaged
        }
    }

    /// Decompresses a zstd stream. It may consist of several frames, which together must yield
    /// exactly a cluster.
    private func unzstd(
        _ input: UnsafeRawBufferPointer, _ output: UnsafeMutableRawBufferPointer
    ) throws(Failure) {
        // The usual case is a single frame, which needs no streaming buffers.
        let frame = ZSTD_findFrameCompressedSize(input.baseAddress, input.count)
        if ZSTD_isError(frame) == 0 {
            let produced = ZSTD_decompressDCtx(
                zstd, output.baseAddress, output.count, input.baseAddress, frame)
            if produced == output.count { return }
        }
        var source = ZSTD_inBuffer(src: input.baseAddress, size: input.count, pos: 0)
        var sink = ZSTD_outBuffer(dst: output.baseAddress, size: output.count, pos: 0)
        ZSTD_DCtx_reset(zstd, ZSTD_reset_session_only)
        var pending = 1
        while sink.pos < sink.size {
            let before = (source.pos, sink.pos)
            pending = ZSTD_decompressStream(zstd, &sink, &source)
            guard ZSTD_isError(pending) == 0 else {
                throw ZSTD_getErrorCode(pending) == ZSTD_error_memory_allocation
                    ? .noMemory : .damaged
            }
            guard before != (source.pos, sink.pos) else {
                throw pending == 0 ? .tooShort : .damaged
            }
        }
        guard pending == 0 else { throw .tooLong }
    }
}
