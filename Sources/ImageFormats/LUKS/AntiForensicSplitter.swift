import CGcrypt
import DiskImage

/// Splits a key into many stripes, all of which are needed to get it back: what is left of a key
/// slot that was wiped in part is worth nothing.
///
/// Source: "LUKS On-Disk Format Specification", version 1.2.3, section 2.4.
struct AntiForensicSplitter {
    let hash: String
    /// Length of the hash in bytes.
    let hashLength: Int
    /// Length of the key, and of a stripe, in bytes.
    let keyLength: Int
    let stripes = Int(LUKSHeader.stripes)

    /// - Throws: `ImageError` without a file's name for an unknown hash.
    init(hash: String, keyLength: Int) throws(ImageError) {
        try CryptoLibrary.require()
        guard let hashLength = CryptoLibrary.hashLength(hash) else {
            throw ImageError(.unsupported, "Hash algorithm '\(hash)' is not supported")
        }
        self.hash = hash
        self.hashLength = hashLength
        self.keyLength = keyLength
    }

    /// - Parameter material: `stripes` times as long as the key, or longer.
    func merge(_ material: RawSpan) -> SecretBytes {
        let last = stripes - 1
        return SecretBytes(count: keyLength) { key in
            for stripe in 0..<last {
                add(stripe, of: material, to: key)
                diffuse(key)
            }
            add(last, of: material, to: key)
        }
    }

    /// Fills `material` with stripes of the key.
    func split(_ key: SecretBytes, into material: inout MutableRawSpan) throws(ImageError) {
        let last = (stripes - 1) * keyLength
        var random = material.slice(0..<last)
        try random.withUnsafeMutableBytes { bytes throws(ImageError) in
            try CryptoLibrary.randomize(bytes)
        }
        var end = material.slice(last..<last + keyLength)
        end.zeroFill()
        // With zeros as the last stripe, merging gives what that stripe has to be, but for the key.
        let rest = merge(material.bytes)
        var place = material.slice(last..<last + keyLength)
        place.withUnsafeMutableBytes { place in
            key.withBytes { key in
                rest.withBytes { rest in
                    for index in 0..<keyLength { place[index] = key[index] ^ rest[index] }
                }
            }
        }
    }

    private func add(
        _ stripe: Int, of material: RawSpan, to key: UnsafeMutableRawBufferPointer
    ) {
        for index in 0..<keyLength {
            key[index] ^= material.unsafeLoad(
                fromByteOffset: stripe * keyLength + index, as: UInt8.self)
        }
    }

    /// Replaces each piece as long as the hash by the hash of its number and its bytes.
    private func diffuse(_ key: UnsafeMutableRawBufferPointer) {
        let longestHash = 64
        withUnsafeTemporaryAllocation(byteCount: 4 + 2 * longestHash, alignment: 8) { scratch in
            let result = UnsafeMutableRawBufferPointer(rebasing: scratch[(4 + longestHash)...])
            for (number, start) in stride(from: 0, to: keyLength, by: hashLength).enumerated() {
                let count = min(hashLength, keyLength - start)
                scratch.storeBytes(of: UInt32(number).bigEndian, as: UInt32.self)
                for index in 0..<count { scratch[4 + index] = key[start + index] }
                cgcrypt_hash(hash, scratch.baseAddress, 4 + count, result.baseAddress)
                for index in 0..<count { key[start + index] = result[index] }
            }
            scratch.wipe()
        }
    }
}
