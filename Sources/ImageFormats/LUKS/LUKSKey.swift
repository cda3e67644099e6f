import DiskImage

/// The content of a key slot in a LUKS header: the master key, encrypted by a passphrase.
struct LUKSKey: Sendable {
    let iterations: UInt32
    let salt: [UInt8]
    /// The encrypted stripes of the master key, in whole sectors.
    let material: [UInt8]

    /// Time in milliseconds that deriving a key from the passphrase takes if no other is asked for.
    static let usualTime: Int64 = 2000
    /// An hour in milliseconds, longer than any user waits for a key.
    private static let longestTime: Int64 = 3_600_000

    /// - Parameter time: in milliseconds.
    /// - Throws: `ImageError` in qemu-img's words.
    static func checkedTime(_ time: Int64) throws(ImageError) -> Int64 {
        guard (0...longestTime).contains(time) else {
            throw .invalid("PBKDF iterations too large to scale: \(time) ms")
        }
        return time
    }

    /// Encrypts a master key. This takes `time`, in milliseconds, and a little more.
    ///
    /// - Throws: `ImageError` or `CancellationError`.
    init(
        _ masterKey: SecretBytes, passphrase: SecretBytes, _ spec: CipherSpec, hash: String,
        time: Int64
    ) throws {
        salt = try CryptoLibrary.randomBytes(LUKSHeader.saltLength)
        iterations = try CryptoLibrary.iterations(hash, length: spec.keyLength, time: time)
        let slotKey = try CryptoLibrary.derive(
            passphrase, salt: salt, hash: hash, iterations: iterations, length: spec.keyLength)
        var material = try IOBuffer.zeros(
            byteCount: Int(LUKSHeader.materialLength(keyLength: spec.keyLength)))
        defer { material.wipe() }
        var span = material.mutableBytes
        try AntiForensicSplitter(hash: hash, keyLength: spec.keyLength)
            .split(masterKey, into: &span)
        try DiskCipher(spec, key: slotKey).encrypt(&span, at: 0)
        self.material = material.bytes.withUnsafeBytes { Array($0) }
    }

    /// The first fields of a slot in the header: its state, iterations and salt.
    ///
    /// - Parameter key: nil for a slot without a key.
    static func state(_ key: LUKSKey?) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(key == nil ? LUKSHeader.disabledKey : LUKSHeader.enabledKey)
        bytes.appendBigEndian(key?.iterations ?? 0)
        return bytes + (key?.salt ?? [UInt8](repeating: 0, count: LUKSHeader.saltLength))
    }
}
