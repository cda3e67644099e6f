import DiskImage
import ImageStorage

extension LUKSHeader {
    /// Finds the master key by a passphrase.
    ///
    /// - Parameter storage: begins with the header.
    /// - Throws: `ImageError` for a wrong passphrase, and for a cipher or hash that is not
    ///   supported.
    func unlock(
        _ passphrase: SecretBytes, in storage: any Storage
    ) async throws -> DiskCipher {
        let spec = try cipherSpec(storage.name)
        for slot in slots where slot.iterations != nil {
            try Task.checkCancellation()
            let key = try await masterKey(slot, passphrase, spec, in: storage)
            if try isMasterKey(key) { return try DiskCipher(spec, key: key) }
        }
        throw ImageError(
            .invalid, path: storage.name, "Invalid password, cannot unlock any keyslot")
    }

    /// The key that the slot makes of a passphrase, right or wrong.
    private func masterKey(
        _ slot: KeySlot, _ passphrase: SecretBytes, _ spec: CipherSpec, in storage: any Storage
    ) async throws -> SecretBytes {
        var material = try IOBuffer(byteCount: Int(materialLength))
        defer { material.wipe() }
        var span = material.mutableBytes
        try await storage.read(into: &span, at: slot.keyOffset)
        let key = try CryptoLibrary.derive(
            passphrase, salt: slot.salt, hash: hash, iterations: slot.iterations ?? 1,
            length: keyLength)
        try DiskCipher(spec, key: key).decrypt(&span, at: 0)
        return try AntiForensicSplitter(hash: hash, keyLength: keyLength).merge(material.bytes)
    }

    private func isMasterKey(_ key: SecretBytes) throws -> Bool {
        guard masterKeyIterations > 0 else { return false }
        let digest = try CryptoLibrary.derive(
            key, salt: masterKeySalt, hash: hash, iterations: masterKeyIterations,
            length: Self.digestLength)
        return digest.withBytes { Array($0) == masterKeyDigest }
    }
}
