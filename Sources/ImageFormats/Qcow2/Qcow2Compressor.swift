import CISAL
import CZlib
import CZstd
import DiskImage
import Glibc

/// Compresses clusters. Used by one task at a time; its state is allocated once and reused.
///
/// Every deflate stream keeps to a window of 4 KiB, as qemu's streams do, because readers that
/// stream a cluster use a window of that size (see docs/mechanisms.md).
final class Qcow2Compressor: @unchecked Sendable {
    private static let windowBits: Int32 = 12

    private enum State {
        case zlib(UnsafeMutablePointer<z_stream>, isTuned: Bool)
        case isal(UnsafeMutablePointer<isal_zstream>, tables: UnsafeMutableRawPointer)
        case zstd(OpaquePointer)
    }

    private let state: State

    /// - Parameters:
    ///   - level: one of the method's `levels`; nil for the library's default.
    ///   - clusterSize: length in bytes of the clusters that will be compressed.
    /// - Throws: `ImageError` if there is not enough memory.
    init(
        _ method: Qcow2Compression, level: Int? = nil, clusterSize: Int64
    ) throws(ImageError) {
        switch (method, level) {
        case (.zlib, 1): state = try Self.makeISAL()
        case (.zlib, _):
            state = .zlib(
                try Self.makeDeflate(level.map(Int32.init) ?? Z_DEFAULT_COMPRESSION),
                isTuned: level == nil)
        case (.zstd, _): state = .zstd(try Self.makeZstd(level, clusterSize: clusterSize))
        }
    }

    /// Allocates zstd's state. At the default level zstd uses two hash tables, whose sizes do not
    /// grow from 32 to 128 KiB of input. Sizes in proportion to the input, as set below, take an
    /// eighth less time there and make streams a little shorter. For smaller clusters zstd's own
    /// sizes are like these; for larger ones the tables no longer fit into a core's cache.
    private static func makeZstd(
        _ level: Int?, clusterSize: Int64
    ) throws(ImageError) -> OpaquePointer {
        guard let context = ZSTD_createCCtx() else { throw .outOfMemory() }
        var parameters = [(ZSTD_c_compressionLevel, level.map(Int32.init) ?? ZSTD_CLEVEL_DEFAULT)]
        if level == nil, [64 << 10, 128 << 10].contains(clusterSize) {
            let bits = Int32(clusterSize.trailingZeroBitCount)
            parameters += [(ZSTD_c_hashLog, bits + 1), (ZSTD_c_chainLog, bits)]
        }
        for (parameter, value) in parameters {
            let status = ZSTD_CCtx_setParameter(context, parameter, value)
            precondition(ZSTD_isError(status) == 0, "an unchecked parameter of compression")
        }
        return context
    }

    deinit {
        switch state {
        case .zlib(let stream, _):
            deflateEnd(stream)
            free(stream)
        case .isal(let stream, let tables):
            free(stream)
            free(tables)
        case .zstd(let context): ZSTD_freeCCtx(context)
        }
    }

    /// Allocates zlib's state. memLevel 8 is faster than qemu's 9 here and gives the same size.
    private static func makeDeflate(
        _ level: Int32
    ) throws(ImageError) -> UnsafeMutablePointer<z_stream> {
        let stream = try allocate(MemoryLayout<z_stream>.size).assumingMemoryBound(
            to: z_stream.self)
        stream.initialize(to: z_stream())
        let status = deflateInit2_(
            stream, level, Z_DEFLATED, -windowBits, 8, Z_DEFAULT_STRATEGY, ZLIB_VERSION,
            Int32(MemoryLayout<z_stream>.size))
        guard status == Z_OK else {
            free(stream)
            throw .outOfMemory()
        }
        return stream
    }

    /// Allocates ISA-L's state, for the fastest level. ISA-L's best level takes an eighth of the
    /// time of zlib's default level, for streams that are some 7 % longer. zlib's own level 1 takes
    /// a third of the default level's time, for streams that are longer still.
    private static func makeISAL() throws(ImageError) -> State {
        let size = cisal_level3_buffer_size()
        let stream = try allocate(MemoryLayout<isal_zstream>.size)
            .assumingMemoryBound(to: isal_zstream.self)
        let tables: UnsafeMutableRawPointer
        do {
            tables = try allocate(Int(size))
        } catch {
            free(stream)
            throw error
        }
        isal_deflate_init(stream)
        stream.pointee.level = 3
        stream.pointee.level_buf = tables.assumingMemoryBound(to: UInt8.self)
        stream.pointee.level_buf_size = size
        stream.pointee.hist_bits = UInt16(windowBits)
        return .isal(stream, tables: tables)
    }

    /// Allocates memory for a library's state, aligned to cache lines. The caller frees it with
    /// `free`.
    private static func allocate(
        _ byteCount: Int
    ) throws(ImageError) -> UnsafeMutableRawPointer {
        var memory: UnsafeMutableRawPointer?
        guard posix_memalign(&memory, 64, byteCount) == 0, let memory else {
            throw .outOfMemory(byteCount)
        }
        return memory
    }

    /// Compresses a cluster into the output buffer.
    ///
    /// - Returns: length of the stream in bytes; nil if it does not fit and so is not worth
    ///   storing.
    /// - Throws: `ImageError` if there is not enough memory.
    func compress(
        _ cluster: RawSpan, into output: inout MutableRawSpan
    ) throws(ImageError) -> Int? {
        try cluster.withUnsafeBytes { input throws(ImageError) -> Int? in
            try output.withUnsafeMutableBytes { output throws(ImageError) -> Int? in
                switch state {
                case .zlib(let stream, let isTuned):
                    return Self.deflate(stream, isTuned: isTuned, input, output)
                case .isal(let stream, _): return Self.isal(stream, input, output)
                case .zstd(let context): return try Self.zstd(context, input, output)
                }
            }
        }
    }

    private static func deflate(
        _ stream: UnsafeMutablePointer<z_stream>, isTuned: Bool,
        _ input: UnsafeRawBufferPointer, _ output: UnsafeMutableRawBufferPointer
    ) -> Int? {
        guard deflateReset(stream) == Z_OK else { return nil }
        // In a window of 4 KiB long searches find next to nothing. With these limits instead of
        // those of level 6 (8, 16, 128, 128) compression takes a fifth less time, for streams 0.3 %
        // longer. A reset undoes the tuning, so it is repeated for each cluster.
        if isTuned { deflateTune(stream, 4, 8, 32, 32) }
        stream.pointee.next_in = UnsafeMutablePointer(
            mutating: input.baseAddress?.assumingMemoryBound(to: Bytef.self))
        stream.pointee.avail_in = uInt(input.count)
        stream.pointee.next_out = output.baseAddress?.assumingMemoryBound(to: Bytef.self)
        stream.pointee.avail_out = uInt(output.count)
        guard CZlib.deflate(stream, Z_FINISH) == Z_STREAM_END else { return nil }
        return output.count - Int(stream.pointee.avail_out)
    }

    private static func isal(
        _ stream: UnsafeMutablePointer<isal_zstream>, _ input: UnsafeRawBufferPointer,
        _ output: UnsafeMutableRawBufferPointer
    ) -> Int? {
        isal_deflate_reset(stream)
        stream.pointee.end_of_stream = 1
        stream.pointee.flush = UInt16(NO_FLUSH)
        stream.pointee.next_in = UnsafeMutablePointer(
            mutating: input.baseAddress?.assumingMemoryBound(to: UInt8.self))
        stream.pointee.avail_in = UInt32(input.count)
        stream.pointee.next_out = output.baseAddress?.assumingMemoryBound(to: UInt8.self)
        stream.pointee.avail_out = UInt32(output.count)
        guard isal_deflate(stream) == COMP_OK,
            stream.pointee.internal_state.state == ZSTATE_END
        else { return nil }
        return output.count - Int(stream.pointee.avail_out)
    }

    private static func zstd(
        _ context: OpaquePointer, _ input: UnsafeRawBufferPointer,
        _ output: UnsafeMutableRawBufferPointer
    ) throws(ImageError) -> Int? {
        let length = ZSTD_compress2(
            context, output.baseAddress, output.count, input.baseAddress, input.count)
        if ZSTD_isError(length) == 0 { return length }
        guard ZSTD_getErrorCode(length) != ZSTD_error_memory_allocation else {
            throw .outOfMemory()
        }
        return nil
    }
}
