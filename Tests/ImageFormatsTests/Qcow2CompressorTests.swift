import CZlib
import DiskImage
import ImageStorage
import Testing

@testable import ImageFormats

@Suite struct Qcow2CompressorTests {
    private static let clusterSize = 64 << 10

    /// Words that repeat near by, and a block that repeats 20000 bytes further on, which a
    /// compressor with a large window would refer back to.
    private static let cluster: [UInt8] = {
        var state: UInt64 = 42
        func random() -> UInt64 {
            state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
            return state >> 33
        }
        let words = (0..<200).map { _ in
            (0..<Int(random() % 9 + 2)).map { _ in UInt8(97 + random() % 26) }
        }
        var text: [UInt8] = []
        while text.count < 20000 { text += words[Int(random() % 200)] + [32] }
        let block = Array(text.prefix(20000))
        return Array((block + block + block + block).prefix(clusterSize))
    }()

    private func compress(_ method: Qcow2Compression, level: Int?) throws -> [UInt8]? {
        let compressor = try Qcow2Compressor(
            method, level: level, clusterSize: Int64(Self.clusterSize))
        var output = try IOBuffer(byteCount: Self.clusterSize)
        var room = output.mutableBytes
        let cluster = Self.cluster.span.bytes
        // The second time round nothing must be left over from the first.
        _ = try compressor.compress(cluster, into: &room)
        guard let length = try compressor.compress(cluster, into: &room) else { return nil }
        return output.bytes.extracting(0..<length).withUnsafeBytes { Array($0) }
    }

    /// As readers do that stream a cluster: a window of 4 KiB, output a little at a time.
    private func streamed(_ deflated: [UInt8]) -> [UInt8]? {
        var stream = z_stream()
        inflateInit2_(&stream, -12, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size))
        defer { inflateEnd(&stream) }
        var input = deflated
        var result: [UInt8] = []
        return input.withUnsafeMutableBufferPointer { input in
            stream.next_in = input.baseAddress
            stream.avail_in = uInt(input.count)
            var step = [UInt8](repeating: 0, count: 700)
            while true {
                let status = step.withUnsafeMutableBufferPointer { step in
                    stream.next_out = step.baseAddress
                    stream.avail_out = uInt(step.count)
                    return inflate(&stream, Z_NO_FLUSH)
                }
                result += step[..<(step.count - Int(stream.avail_out))]
                if status == Z_STREAM_END { return result }
                guard status == Z_OK else { return nil }
            }
        }
    }

    @Test(arguments: [nil] + Qcow2Compression.zlib.levels.map(Optional.some))
    func deflateKeepsToASmallWindow(level: Int?) throws {
        let deflated = try #require(try compress(.zlib, level: level))
        #expect(deflated.count < Self.clusterSize / 2)
        #expect(streamed(deflated) == Self.cluster)
    }

    /// What the test above would say of a stream with the usual window.
    @Test func aLargeWindowWouldShow() throws {
        var bound = compressBound(uLong(Self.clusterSize))
        var deflated = [UInt8](repeating: 0, count: Int(bound))
        #expect(compress2(&deflated, &bound, Self.cluster, uLong(Self.clusterSize), 6) == Z_OK)
        // Without zlib's header and checksum.
        #expect(streamed(Array(deflated[2..<Int(bound) - 4])) == nil)
    }

    @Test(arguments: [nil, 1, 3, 19, 22])
    func zstdUnpacks(level: Int?) throws {
        let packed = try #require(try compress(.zstd, level: level))
        let decompressor = try Qcow2Decompressor(.zstd)
        var output = try IOBuffer(byteCount: Self.clusterSize)
        var room = output.mutableBytes
        try decompressor.decompress(packed.span.bytes, into: &room)
        #expect(output.bytes.withUnsafeBytes { Array($0) } == Self.cluster)
    }

    @Test(arguments: [(Qcow2Compression.zlib, 0), (.zlib, 10), (.zstd, 0), (.zstd, 23)])
    func refusesOtherLevels(method: Qcow2Compression, level: Int) {
        var options = Qcow2Options()
        options.compression = method
        options.compressionLevel = level
        #expect(throws: ImageError.self) { try options.geometry(virtualSize: 1 << 20) }
    }
}
