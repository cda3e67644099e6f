import CDigest
import DiskImage

/// A SHA-256 computed by libcrypto (`CDigest.h` says why), for one task at a time.
struct SHA256: ~Copyable, ByteSink, @unchecked Sendable {
    /// 64 KiB, so that the zeros stay in the core's cache.
    private static let zeros = [UInt8](repeating: 0, count: 64 << 10)

    private let digest: UnsafeMutableRawPointer

    /// The reason that libcrypto cannot be used, or nil; the first access loads libcrypto.
    private static let problem: String? = cdigest_load().map { String(cString: $0) }

    /// - Throws: `ImageError` if libcrypto is missing or fails.
    init() throws(ImageError) {
        if let problem = Self.problem {
            throw .unsupported(
                "libcrypto", "digests need OpenSSL's library (Debian: libssl3): \(problem)")
        }
        guard let digest = cdigest_sha256_create() else { throw Self.failure }
        self.digest = digest
    }

    deinit { cdigest_destroy(digest) }

    private static let failure = ImageError.unsupported("libcrypto", "cannot compute a SHA-256")

    mutating func add(_ bytes: RawSpan) throws(ImageError) {
        let isDone = bytes.withUnsafeBytes { cdigest_update(digest, $0.baseAddress, $0.count) }
        guard isDone else { throw Self.failure }
    }

    mutating func addZeros(_ count: Int64) throws(ImageError) {
        let zeros = Self.zeros.span.bytes
        var rest = count
        while rest > 0 {
            let part = Int(min(rest, Int64(zeros.byteCount)))
            try add(zeros.extracting(0..<part))
            rest -= Int64(part)
        }
    }

    /// The 32 bytes of the hash. Bytes added later begin a new hash.
    mutating func finish() throws(ImageError) -> [UInt8] {
        let length = Int(cdigest_sha256_length)
        var isDone = false
        let bytes = [UInt8](unsafeUninitializedCapacity: length) { buffer, count in
            isDone = cdigest_finish(digest, buffer.baseAddress)
            count = isDone ? length : 0
        }
        guard isDone else { throw Self.failure }
        return bytes
    }
}
