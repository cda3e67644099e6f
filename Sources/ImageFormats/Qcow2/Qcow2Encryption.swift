import DiskImage
import ImageStorage

/// The encryption of an image's data clusters. Tables and compressed clusters are not encrypted.
///
/// Source: QEMU's docs/interop/qcow2.txt, "crypt_method" and "Full disk encryption header pointer".
struct Qcow2Encryption: Sendable {
    let cipher: DiskCipher
    /// Whether start values count the sectors of the guest disk (AES), not those of the file
    /// (LUKS).
    private let countsGuestSectors: Bool
    /// Whether new data can be encrypted; AES is only read.
    var canWrite: Bool { !countsGuestSectors }

    /// Prefix of the options.
    static let prefix = "encrypt."
    /// Length in bytes of the key of the old AES encryption.
    private static let oldKeyLength = 16

    /// The encryption of a new image.
    init(_ volume: LUKSVolume) {
        cipher = volume.cipher
        countsGuestSectors = false
    }

    private init(_ cipher: DiskCipher, countsGuestSectors: Bool) {
        self.cipher = cipher
        self.countsGuestSectors = countsGuestSectors
    }

    /// Finds the key of an image.
    ///
    /// - Returns: nil if the image is not encrypted.
    /// - Throws: `ImageError`, in qemu's words for a missing or wrong passphrase.
    static func open(
        _ header: Qcow2Header, in storage: any Storage, _ key: ImageKey
    ) async throws -> Qcow2Encryption? {
        try check(header, key.described.format, storage.name)
        guard let format = header.encryptionFormat else { return nil }
        guard format == .luks, let place = header.encryptionHeader else {
            let cipher = try await key.cipher(prefix: prefix, image: storage.name, oldCipher)
            return Qcow2Encryption(cipher, countsGuestSectors: true)
        }
        guard place.offset % UInt64(header.geometry.clusterSize) == 0 else {
            throw ImageError.corrupt(
                storage.name, "the offset of the LUKS header is no multiple of the cluster size")
        }
        let part = try place.part(of: storage, "LUKS header")
        let cipher = try await key.cipher(prefix: prefix, image: storage.name) {
            try await LUKSHeader.read(from: part).unlock($0, in: part)
        }
        return Qcow2Encryption(cipher, countsGuestSectors: false)
    }

    /// Throws if the description names another encryption than the header.
    private static func check(
        _ header: Qcow2Header, _ described: String?, _ name: String
    ) throws(ImageError) {
        guard let described, described != header.encryptionFormat?.rawValue else { return }
        throw ImageError(
            .invalid, path: name,
            header.encryptionFormat.map {
                "Header reported '\($0)' encryption format but options specify '\(described)'"
            } ?? "No encryption in image header, but options specified format '\(described)'")
    }

    /// The old encryption: the passphrase itself is the key. Nothing tells whether it is right.
    private static func oldCipher(_ passphrase: SecretBytes) throws(ImageError) -> DiskCipher {
        let key = SecretBytes(count: oldKeyLength) { key in
            passphrase.withBytes { key.copyBytes(from: $0.prefix(oldKeyLength)) }
        }
        return try DiskCipher(
            CipherSpec(
                cipher: "aes", mode: .cbc, startValue: .plain64, keyLength: oldKeyLength), key: key)
    }

    /// The offset by which `DiskCipher` counts sectors.
    private func offset(host: Int64, guest: Int64) -> Int64 { countsGuestSectors ? guest : host }

    /// Reads the bytes of a mapping.
    func read(
        _ mapping: Mapping, from storage: any Storage, into buffer: inout MutableRawSpan
    ) async throws {
        let host = mapping.host?.lowerBound ?? 0
        try await storage.readEncrypted(
            into: &buffer, at: host, cipher, offset: offset(host: host, guest: mapping.layerOffset))
    }

    /// Encrypts a whole cluster.
    func encrypted(
        _ cluster: [UInt8], host: Int64, guest: Int64
    ) throws(ImageError) -> [UInt8] {
        var cluster = cluster
        var span = cluster.mutableSpan
        var bytes = span.mutableBytes
        try cipher.encrypt(&bytes, at: offset(host: host, guest: guest))
        return cluster
    }
}

extension Qcow2Header {
    /// The encryption that the header names; nil for none. The parser refuses unknown ones.
    var encryptionFormat: EncryptionFormat? {
        switch encryptionMethod {
        case 0: nil
        case Self.luks: .luks
        default: .aes
        }
    }

    enum EncryptionFormat: String {
        case aes, luks
    }
}
