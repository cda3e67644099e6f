import CGcrypt
import DiskImage
import Glibc

/// The functions that encrypted images need of libgcrypt and of the kernel's random numbers.
enum CryptoLibrary {
    /// The reason why libgcrypt cannot be used, or nil; the first access loads it.
    private static let problem: String? = cgcrypt_load().map { String(cString: $0) }

    /// The hashes of qemu; libgcrypt has more.
    static let hashes: Set<String> = [
        "md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160",
    ]

    /// - Throws: `ImageError` if libgcrypt is missing or too old.
    static func require() throws(ImageError) {
        guard let problem else { return }
        throw .unsupported(
            "libgcrypt",
            "encrypted images need the library libgcrypt (Debian: libgcrypt20): \(problem)")
    }

    /// Length of a hash in bytes; nil if it is not known.
    static func hashLength(_ hash: String) -> Int? {
        guard hashes.contains(hash) else { return nil }
        let length = cgcrypt_hash_length(hash)
        return length == 0 ? nil : length
    }

    /// Derives a key by PBKDF2.
    ///
    /// - Parameters:
    ///   - iterations: at least 1.
    ///   - length: of the key, in bytes.
    /// - Throws: `ImageError`, or `CancellationError`: a header can ask for hours of work.
    static func derive(
        _ secret: SecretBytes, salt: [UInt8], hash: String, iterations: UInt32, length: Int
    ) throws -> SecretBytes {
        try SecretBytes(count: length) { key in
            guard let place = key.baseAddress else { throw failure }
            let outcome = secret.withBytes {
                cgcrypt_derive(
                    hash, $0.baseAddress, $0.count, salt, salt.count, iterations, place, length,
                    { Task.isCancelled })
            }
            switch outcome {
            case cgcrypt_done: break
            case cgcrypt_stopped: throw CancellationError()
            default: throw failure
            }
        }
    }

    /// The fewest iterations, whatever the time, as in qemu.
    private static let fewestIterations: UInt32 = 1000
    /// Processor time in nanoseconds that a measurement has to take to mean something.
    private static let measuredTime: Int64 = 4_000_000

    /// The number of iterations of PBKDF2 that take `time` milliseconds on this processor.
    ///
    /// - Parameter length: of the key, in bytes.
    /// - Throws: as `derive`.
    static func iterations(_ hash: String, length: Int, time: Int64) throws -> UInt32 {
        let secret = SecretBytes(Array("password".utf8))
        let salt = [UInt8](repeating: 0, count: LUKSHeader.saltLength)
        var tried: UInt32 = 1000
        while true {
            let start = processorTime
            _ = try derive(secret, salt: salt, hash: hash, iterations: tried, length: length)
            let taken = processorTime - start
            if taken >= measuredTime || tried > .max / 4 {
                let wanted = Double(tried) * Double(time) * 1e6 / Double(max(taken, 1))
                guard wanted <= Double(UInt32.max) else {
                    throw ImageError.invalid("PBKDF iterations too large to scale: \(time) ms")
                }
                return max(fewestIterations, UInt32(wanted))
            }
            tried *= 2
        }
    }

    /// Processor time of this thread in nanoseconds.
    private static var processorTime: Int64 {
        var time = timespec()
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
        return Int64(time.tv_sec) * 1_000_000_000 + Int64(time.tv_nsec)
    }

    static let failure = ImageError.unsupported("libgcrypt", "cannot encrypt, decrypt or hash")

    /// Fills memory with random bytes of the kernel.
    static func randomize(_ memory: UnsafeMutableRawBufferPointer) throws(ImageError) {
        guard cgcrypt_randomize(memory.baseAddress, memory.count) else {
            throw ImageError(
                .unsupported, "cannot get random numbers: \(String(cString: strerror(errno)))")
        }
    }

    /// Random bytes that need not be secret.
    static func randomBytes(_ count: Int) throws(ImageError) -> [UInt8] {
        try SecretBytes(count: count) { memory throws(ImageError) in try randomize(memory) }
            .withBytes { Array($0) }
    }
}
