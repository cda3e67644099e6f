import CZlib
import CZstd

/// Packs clusters. Used by one task at a time; its state is made once and reused.
final class Qcow2Compressor: @unchecked Sendable {
    private enum State {
        case zlib(UnsafeMutablePointer<z_stream>)
        case zstd(OpaquePointer)
    }

    private let state: State

    init(_ method: Qcow2Compression) {
        switch method {
        case .zlib: state = .zlib(Self.makeDeflate())
        case .zstd:
            guard let context = ZSTD_createCCtx() else { preconditionFailure("out of memory") }
            state = .zstd(context)
        }
    }

    deinit {
        switch state {
        case .zlib(let stream):
            deflateEnd(stream)
            stream.deallocate()
        case .zstd(let context): ZSTD_freeCCtx(context)
        }
    }

    /// Raw deflate in a window of 4 KiB: readers that stream a cluster use one of that size, as qemu
    /// writes it (see "Deflate" in docs/architecture.md). memLevel 8 is faster than qemu's 9 here and
    /// gives the same size.
    private static func makeDeflate() -> UnsafeMutablePointer<z_stream> {
        let stream = UnsafeMutablePointer<z_stream>.allocate(capacity: 1)
        stream.initialize(to: z_stream())
        let status = deflateInit2_(
            stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12, 8, Z_DEFAULT_STRATEGY, ZLIB_VERSION,
            Int32(MemoryLayout<z_stream>.size))
        precondition(status == Z_OK, "out of memory")
        return stream
    }

    /// - Returns: how long the stream is, or nil if it does not fit: then it is not worth storing.
    func compress(_ cluster: RawSpan, into output: inout MutableRawSpan) -> Int? {
        cluster.withUnsafeBytes { input in
            output.withUnsafeMutableBytes { output in
                switch state {
                case .zlib(let stream): Self.deflate(stream, input, output)
                case .zstd(let context): Self.zstd(context, input, output)
                }
            }
        }
    }

    private static func deflate(
        _ stream: UnsafeMutablePointer<z_stream>, _ input: UnsafeRawBufferPointer,
        _ output: UnsafeMutableRawBufferPointer
    ) -> Int? {
        guard deflateReset(stream) == Z_OK else { return nil }
        stream.pointee.next_in = UnsafeMutablePointer(
            mutating: input.baseAddress?.assumingMemoryBound(to: Bytef.self))
        stream.pointee.avail_in = uInt(input.count)
        stream.pointee.next_out = output.baseAddress?.assumingMemoryBound(to: Bytef.self)
        stream.pointee.avail_out = uInt(output.count)
        guard CZlib.deflate(stream, Z_FINISH) == Z_STREAM_END else { return nil }
        return output.count - Int(stream.pointee.avail_out)
    }

    private static func zstd(
        _ context: OpaquePointer, _ input: UnsafeRawBufferPointer,
        _ output: UnsafeMutableRawBufferPointer
    ) -> Int? {
        let length = ZSTD_compress2(
            context, output.baseAddress, output.count, input.baseAddress, input.count)
        return ZSTD_isError(length) == 0 ? length : nil
    }
}
