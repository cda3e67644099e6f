import DiskImage
import ImageStorage

/// A stream that has to have a certain SHA-256 at its end.
final class HashedStream: ByteStream, @unchecked Sendable {
    private let base: any ByteStream
    private let expected: DiskDigest
    private let name: String
    // Used by the one call at a time.
    private var hash: SHA256

    /// - Parameter name: of the file, for messages.
    /// - Throws: `ImageError` if libcrypto is missing or fails.
    init(_ base: any ByteStream, expecting digest: DiskDigest, name: String) throws(ImageError) {
        self.base = base
        expected = digest
        self.name = name
        hash = try SHA256()
    }

    var progress: StreamProgress? { base.progress }

    func read(into buffer: inout MutableRawSpan) async throws -> Int {
        let count = try await base.read(into: &buffer)
        try hash.add(buffer.bytes.extracting(0..<count))
        if count < buffer.byteCount {
            let found = DiskDigest(.sha256, try hash.finish())
            guard found == expected else {
                throw ImageError(
                    .invalid, path: name, "the digest of the file is \(found), not \(expected)")
            }
        }
        return count
    }
}
