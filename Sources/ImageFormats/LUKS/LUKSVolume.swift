import DiskImage
import ImageStorage

/// The options of a new LUKS header, as `-o` sets them.
struct LUKSOptions: Sendable {
    var spec = CipherSpec(cipher: "aes", mode: .xts, startValue: .plain64, keyLength: 64)
    var hash = "sha256"
    /// Time that deriving a key from the passphrase is to take, in milliseconds.
    var iterationTime = LUKSKey.usualTime
    let passphrase: SecretBytes

    private static let ciphers = [
        "aes", "des", "3des", "cast5", "serpent", "twofish",
    ]

    /// - Parameter prefix: stands before the keys of the options: `encrypt.` for qcow2.
    /// - Throws: `ImageError` in qemu-img's words.
    init(_ options: TypedOptions, prefix: String) throws(ImageError) {
        passphrase = try options.secrets.passphrase(
            options.text(prefix + "key-secret"), prefix: prefix)
        func text(_ key: String) -> String? { options.text(prefix + key) }
        if let hash = text("hash-alg") {
            guard CryptoLibrary.hashes.contains(hash) else { throw Self.refused("hash-alg", hash) }
            self.hash = hash
        }
        if let time = options.number(prefix + "iter-time") {
            iterationTime = try LUKSKey.checkedTime(time)
        }
        let hash = text("ivgen-hash-alg")
        if let hash, !CryptoLibrary.hashes.contains(hash) {
            throw Self.refused("ivgen-hash-alg", hash)
        }
        spec.startValue = try Self.startValue(text("ivgen-alg") ?? "plain64", hash)
        try setCipher(text("cipher-alg") ?? "aes-256", mode: text("cipher-mode") ?? "xts")
        try spec.check()
    }

    private static func refused(_ key: String, _ value: String) -> ImageError {
        .invalid("Parameter '\(key)' does not accept value '\(value)'")
    }

    private static func startValue(
        _ name: String, _ hash: String?
    ) throws(ImageError) -> CipherSpec.StartValue {
        switch name {
        case "plain": .plain
        case "plain64": .plain64
        case "essiv": .essiv(hash: hash ?? "sha256")
        default: throw refused("ivgen-alg", name)
        }
    }

    private mutating func setCipher(_ name: String, mode: String) throws(ImageError) {
        let parts = name.split(separator: "-").map(String.init)
        guard let cipher = parts.first, Self.ciphers.contains(cipher) else {
            throw Self.refused("cipher-alg", name)
        }
        guard ["ecb", "cbc", "xts", "ctr"].contains(mode) else {
            throw Self.refused("cipher-mode", mode)
        }
        guard let known = CipherSpec.Mode(rawValue: mode) else {
            throw .invalid("Algorithm '\(name)' with '\(mode)' mode not supported")
        }
        guard parts.count == 2, let bits = Int(parts[1]), [128, 192, 256].contains(bits) else {
            throw .invalid("Algorithm '\(name)' not supported")
        }
        spec.cipher = cipher
        spec.mode = known
        spec.keyLength = bits / 8 * (known == .xts ? 2 : 1)
    }

    /// Length in bytes of everything in front of the payload.
    var payloadOffset: Int64 {
        LUKSHeader.firstKeyOffset + Int64(LUKSHeader.slotCount) * materialSpace
    }

    /// Distance of the slots' key material in bytes.
    fileprivate var materialSpace: Int64 {
        LUKSHeader.materialLength(keyLength: spec.keyLength)
            .roundedUp(to: LUKSHeader.firstKeyOffset)
    }
}

/// The LUKS header that a new image is to have.
enum LUKSPlan: Sendable {
    case new(LUKSOptions)
    /// The header of the image that is written, with all its keys.
    ///
    /// - Parameters:
    ///   - storage: begins with the header.
    ///   - length: in bytes, with all key material.
    case copy(of: any Storage, length: Int64, DiskCipher)

    /// Limit for the length of a copied header in bytes; usual ones have 1 or 2 MiB.
    private static let longest: Int64 = 32 << 20

    func makeVolume() async throws -> LUKSVolume {
        switch self {
        case .new(let options): return try LUKSVolume(options)
        case .copy(let storage, let length, let cipher):
            guard length <= Self.longest else {
                throw ImageError.unsupported(
                    storage.name, "cannot copy a LUKS header of \(length) bytes")
            }
            return LUKSVolume(
                bytes: try await storage.readBytes(
                    at: HostOffset(0), count: length, "LUKS header"), length: length,
                cipher: cipher)
        }
    }
}

/// A LUKS header as it is written, and the cipher of the disk behind it.
struct LUKSVolume: Sendable, Equatable {
    /// The header with the key material of its keys; zeros follow.
    let bytes: [UInt8]
    /// Length in bytes of everything in front of the payload.
    let length: Int64
    let cipher: DiskCipher

    fileprivate init(bytes: [UInt8], length: Int64, cipher: DiskCipher) {
        self.bytes = bytes
        self.length = length
        self.cipher = cipher
    }

    /// Makes a master key and the one slot that the passphrase opens. This takes the time that the
    /// options ask for, and a little more.
    ///
    /// - Throws: `ImageError` or `CancellationError`.
    init(_ options: LUKSOptions) throws {
        let spec = options.spec
        let keyLength = spec.keyLength
        let key = try SecretBytes(count: keyLength) { memory throws(ImageError) in
            try CryptoLibrary.randomize(memory)
        }
        cipher = try DiskCipher(spec, key: key)
        length = options.payloadOffset
        let salt = try CryptoLibrary.randomBytes(LUKSHeader.saltLength)
        // As in qemu, the master key's digest takes an eighth of the time.
        let iterations = try CryptoLibrary.iterations(
            options.hash, length: LUKSHeader.digestLength, time: options.iterationTime / 8)
        let digest = try CryptoLibrary.derive(
            key, salt: salt, hash: options.hash, iterations: iterations,
            length: LUKSHeader.digestLength)
        let first = try LUKSKey(
            key, passphrase: options.passphrase, spec, hash: options.hash,
            time: options.iterationTime)

        var bytes = LUKSHeader.magic
        bytes.appendBigEndian(LUKSHeader.version)
        bytes.append(spec.cipher, paddedTo: 40)
        bytes.append("\(spec.mode.rawValue)-\(spec.startValue.name)", paddedTo: 72)
        bytes.append(options.hash, paddedTo: 104)
        bytes.appendBigEndian(UInt32(length / guestSectorSize))
        bytes.appendBigEndian(UInt32(keyLength))
        bytes += digest.withBytes { Array($0) }
        bytes += salt
        bytes.appendBigEndian(iterations)
        bytes.append(try Self.uuid(), paddedTo: LUKSHeader.slotsOffset)
        for number in 0..<LUKSHeader.slotCount {
            bytes += LUKSKey.state(number == 0 ? first : nil)
            let offset = LUKSHeader.firstKeyOffset + Int64(number) * options.materialSpace
            bytes.appendBigEndian(UInt32(offset / guestSectorSize))
            bytes.appendBigEndian(LUKSHeader.stripes)
        }
        bytes.appendZeros(upTo: Int(LUKSHeader.firstKeyOffset))
        self.bytes = bytes + first.material
    }

    static func == (one: LUKSVolume, other: LUKSVolume) -> Bool { one.bytes == other.bytes }

    /// A random UUID (RFC 9562, section 5.4).
    private static func uuid() throws(ImageError) -> String {
        var bytes = try CryptoLibrary.randomBytes(16)
        bytes[6] = bytes[6] & 0x0f | 0x40
        bytes[8] = bytes[8] & 0x3f | 0x80
        let digits = bytes.map { byte in
            let text = String(byte, radix: 16)
            return text.count == 1 ? "0" + text : text
        }
        return [0..<4, 4..<6, 6..<8, 8..<10, 10..<16].map { digits[$0].joined() }
            .joined(separator: "-")
    }
}

extension CipherSpec.StartValue {
    /// The name in a LUKS header.
    var name: String {
        switch self {
        case .plain: "plain"
        case .plain64: "plain64"
        case .essiv(let hash): "essiv:\(hash)"
        }
    }
}

extension [UInt8] {
    /// Appends text, and zeros up to a new count.
    fileprivate mutating func append(_ text: String, paddedTo count: Int) {
        self += text.utf8
        appendZeros(upTo: count)
    }
}
