import CGcrypt
import Concurrency
import DiskImage
import ImageStorage

/// How the sectors of a disk are encrypted, without the key.
struct CipherSpec: Sendable, Equatable {
    enum Mode: String, Sendable, CaseIterable {
        case xts, cbc
    }

    /// The generator of a sector's start value: the number of the sector in 32 or 64 bits, or that
    /// number encrypted.
    enum StartValue: Sendable, Equatable {
        case plain, plain64
        case essiv(hash: String)
    }

    /// The name of the cipher without the length of its key: `aes`, `serpent`, `twofish`.
    var cipher: String
    var mode: Mode
    var startValue: StartValue
    /// Length in bytes of the whole key. Half of it makes the start values of XTS.
    var keyLength: Int

    /// Length of the cipher's own key in bytes.
    var cipherKeyLength: Int { mode == .xts ? keyLength / 2 : keyLength }

    /// - Throws: `ImageError` without a file's name, for what this version cannot decrypt.
    func check() throws(ImageError) {
        try CryptoLibrary.require()
        guard keyLength == cipherKeyLength * (mode == .xts ? 2 : 1),
            cgcrypt_knows(cipher, cipherKeyLength)
        else {
            throw ImageError(
                .unsupported, "Algorithm '\(cipher)-\(cipherKeyLength * 8)' not supported")
        }
        guard case .essiv(let hash) = startValue else { return }
        guard let length = CryptoLibrary.hashLength(hash), cgcrypt_knows(cipher, length) else {
            throw ImageError(
                .unsupported, "the start values 'essiv:\(hash)' are not supported for '\(cipher)'")
        }
    }
}

/// Encrypts and decrypts the sectors of a disk, for any number of tasks at once.
final class DiskCipher: Sendable {
    private let handles: ResourcePool<CipherHandle>

    /// - Throws: `ImageError` without a file's name for an unsupported cipher, or if there is no
    ///   memory.
    init(_ spec: CipherSpec, key: SecretBytes) throws(ImageError) {
        try spec.check()
        handles = ResourcePool { () throws(ImageError) in try CipherHandle(spec, key) }
        // A key that the library refuses is an error now, not in the middle of the work.
        handles.giveBack(try handles.take())
    }

    /// A cipher without a key.
    ///
    /// - Parameter reason: what `decrypt` and `encrypt` throw.
    init(missing reason: ImageError) {
        handles = ResourcePool { () throws(ImageError) in throw reason }
    }

    /// - Parameters:
    ///   - bytes: whole sectors.
    ///   - offset: what start values count from the beginning of, in bytes; a multiple of the
    ///     sector's length.
    func decrypt(_ bytes: inout MutableRawSpan, at offset: Int64) throws(ImageError) {
        try apply(&bytes, at: offset, encrypts: false)
    }

    /// The parameters are those of `decrypt`.
    func encrypt(_ bytes: inout MutableRawSpan, at offset: Int64) throws(ImageError) {
        try apply(&bytes, at: offset, encrypts: true)
    }

    private func apply(
        _ bytes: inout MutableRawSpan, at offset: Int64, encrypts: Bool
    ) throws(ImageError) {
        precondition(offset >= 0 && offset % guestSectorSize == 0)
        precondition(bytes.byteCount % Int(guestSectorSize) == 0)
        let handle = try handles.take()
        let isDone = bytes.withUnsafeMutableBytes {
            cgcrypt_apply(
                handle.cipher, encrypts, UInt64(offset / guestSectorSize), $0.baseAddress, $0.count)
        }
        handles.giveBack(handle)
        guard isDone else { throw CryptoLibrary.failure }
    }
}

/// A cipher of libgcrypt with its key, for one task at a time.
private final class CipherHandle: @unchecked Sendable {
    let cipher: OpaquePointer

    init(_ spec: CipherSpec, _ key: SecretBytes) throws(ImageError) {
        let (startValue, hash): (cgcrypt_start_value, String?) =
            switch spec.startValue {
            case .plain: (cgcrypt_plain, nil)
            case .plain64: (cgcrypt_plain64, nil)
            case .essiv(let hash): (cgcrypt_essiv, hash)
            }
        let made = key.withBytes {
            cgcrypt_create(
                spec.cipher, spec.mode == .xts, $0.baseAddress, $0.count, startValue, hash)
        }
        guard let made else { throw CryptoLibrary.failure }
        cipher = made
    }

    deinit { cgcrypt_destroy(cipher) }
}

extension Storage {
    /// Reads and decrypts bytes, which need not be whole sectors.
    ///
    /// - Parameters:
    ///   - host: offset in the storage, in bytes. A storage that ends within a sector counts as
    ///     filled up with zeros, as in qemu.
    ///   - offset: of the same byte for `DiskCipher.decrypt`, as far into its sector as `host`.
    func readEncrypted(
        into buffer: inout MutableRawSpan, at host: Int64, _ cipher: DiskCipher, offset: Int64
    ) async throws {
        let skipped = Int(offset % guestSectorSize)
        let count = buffer.byteCount
        let length = (skipped + count).roundedUp(to: Int(guestSectorSize))
        let start = host - Int64(skipped)
        if length == count, host + Int64(count) <= size {
            try await read(into: &buffer, at: host)
            return try cipher.decrypt(&buffer, at: offset)
        }
        var sectors = try IOBuffer(byteCount: length)
        var span = sectors.mutableBytes
        let missing = start + Int64(length) - size
        let read = missing > 0 && missing < guestSectorSize ? length - Int(missing) : length
        span.zeroFill(read..<length)
        var part = span.slice(0..<read)
        try await self.read(into: &part, at: start)
        try cipher.decrypt(&span, at: offset - Int64(skipped))
        let wanted = sectors.bytes.extracting(skipped..<skipped + count)
        buffer.withUnsafeMutableBytes { destination in
            wanted.withUnsafeBytes { destination.copyMemory(from: $0) }
        }
    }
}
