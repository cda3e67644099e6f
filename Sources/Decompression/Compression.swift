import DiskImage
import ImageStorage

/// A way in which whole image files are compressed to be published.
public struct Compression: Sendable {
    public let name: String
    /// Endings of the names of such files, in lower case.
    let endings: [String]
    /// The first bytes of such a file.
    let magic: [UInt8]
    let makeDecoder: @Sendable () throws(DecodingError) -> any StreamDecoder

    public static let all: [Compression] = [
        Compression(name: "xz", endings: [".xz"], magic: [0xfd] + Array("7zXZ\0".utf8)) {
            () throws(DecodingError) in try XZDecoder()
        },
        Compression(name: "gzip", endings: [".gz", ".gzip"], magic: [0x1f, 0x8b, 8]) {
            () throws(DecodingError) in GzipDecoder()
        },
        Compression(
            name: "zstd", endings: [".zst", ".zstd"], magic: [0x28, 0xb5, 0x2f, 0xfd]
        ) { () throws(DecodingError) in try ZstdDecoder() },
        Compression(name: "bzip2", endings: [".bz2", ".bzip2"], magic: Array("BZh".utf8)) {
            () throws(DecodingError) in try BZip2Decoder()
        },
    ]

    /// The compression of a file: the one that both its name and its first bytes tell.
    ///
    /// The name alone would not do for a file that was named so by mistake, nor the bytes alone for
    /// a disk whose guest chose them.
    ///
    /// - Parameter path: of the file, or of a URL.
    /// - Returns: nil for a file that is not compressed.
    /// - Throws: `ImageError` if the file cannot be read.
    public static func of(_ storage: any Storage, path: String) async throws -> Compression? {
        let path = path.lowercased()
        let found = all.first { $0.endings.contains { path.hasSuffix($0) } }
        guard let found, storage.size >= Int64(found.magic.count) else { return nil }
        var buffer = try IOBuffer(byteCount: found.magic.count)
        var bytes = buffer.mutableBytes
        try await storage.read(into: &bytes, at: 0)
        let start = buffer.bytes.withUnsafeBytes { Array($0) }
        return start == found.magic ? found : nil
    }

    /// The decompressed bytes of a stream.
    ///
    /// - Parameter name: of the file, for messages.
    /// - Throws: `ImageError` if the library cannot be loaded, or memory is short.
    public func decompress(
        _ stream: any ByteStream, name: String
    ) throws(ImageError) -> any ByteStream {
        let decoder: any StreamDecoder
        do {
            decoder = try makeDecoder()
        } catch {
            throw .unsupported(name, error.reason)
        }
        return try DecompressedStream(stream, decoder, name: name)
    }
}
