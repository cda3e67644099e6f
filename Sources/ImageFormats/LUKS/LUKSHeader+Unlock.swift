import DiskImage
import ImageStorage

extension LUKSHeader {
    /// The cipher of the disk, with the master key that a passphrase opens; parameters as in
    /// `masterKey`.
    func unlock(
        _ passphrase: SecretBytes, in storage: any Storage
    ) async throws -> DiskCipher {
        let key = try await masterKey(passphrase, in: storage)
        return try DiskCipher(cipherSpec(storage.name), key: key)
    }

    /// Finds the master key by a passphrase.
    ///
    /// - Parameter storage: begins with the header.
    /// - Throws: `ImageError` for a wrong passphrase, and for a cipher or hash that is not
    ///   supported.
    func masterKey(
        _ passphrase: SecretBytes, in storage: any Storage
    ) async throws -> SecretBytes {
        for slot in slots.indices {
            if let key = try await masterKey(ofSlot: slot, passphrase, in: storage) { return key }
        }
        throw ImageError(
            .invalid, path: storage.name, "Invalid password, cannot unlock any keyslot"
        ).opening(storage.name)
    }

    /// The master key by one slot; nil if the passphrase does not open it.
    func masterKey(
        ofSlot number: Int, _ passphrase: SecretBytes, in storage: any Storage
    ) async throws -> SecretBytes? {
        let spec = try cipherSpec(storage.name)
        guard slots[number].isActive else { return nil }
        try Task.checkCancellation()
        let key = try await candidate(slots[number], passphrase, spec, in: storage)
        return try isMasterKey(key) ? key : nil
    }

    /// The key that the slot makes of a passphrase, right or wrong.
    private func candidate(
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
