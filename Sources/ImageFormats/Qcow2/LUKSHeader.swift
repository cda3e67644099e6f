import DiskImage
import ImageStorage

/// The LUKS header (version 1) of an encrypted image, without its keys.
///
/// Source: "LUKS On-Disk Format Specification", version 1.2.3, section 2.1 ("PHDR").
public struct LUKSHeader: Sendable, Equatable {
    public struct KeySlot: Sendable, Equatable {
        /// Number of iterations that derive the key of the slot; nil for a slot without a key.
        public let iterations: UInt32?
        public let stripes: UInt32
        /// Place of the key material in bytes from the start of the LUKS header.
        public let keyOffset: Int64
    }

    /// Name of the cipher with the length of the key in bits, such as `aes-256`.
    public let cipher: String
    /// Mode of the cipher, such as `xts`.
    public let mode: String
    /// Generator of the start value of a sector, such as `plain64` or `essiv`.
    public let startValue: String
    /// Hash that the generator uses, `sha256` in `essiv:sha256`; nil if it uses none.
    public let startValueHash: String?
    public let hash: String
    public let uuid: String
    /// Offset of the payload in bytes from the start of the LUKS header.
    public let payloadOffset: Int64
    public let masterKeyIterations: UInt32
    public let slots: [KeySlot]

    private static let length = 592
    private static let enabledKey: UInt32 = 0x00ac_71f3
    private static let stripes: UInt32 = 4000
    private static let disabledKey: UInt32 = 0x0000_dead

    static func read(
        from storage: any Storage, at place: Qcow2Header.TableRange
    ) async throws -> LUKSHeader {
        guard place.length >= UInt64(length) else {
            throw ImageError.corrupt(storage.name, "the LUKS header is too short")
        }
        var cursor = try MetadataCursor(
            storage, "LUKS header", at: place.offset, maximum: Int64(length))
        return try LUKSHeader(await cursor.next(length), storage.name)
    }

    private init(_ bytes: [UInt8], _ name: String) throws(ImageError) {
        guard Array(bytes[0..<6]) == Array("LUKS".utf8) + [0xba, 0xbe],
            bytes.bigEndian(at: 6, as: UInt16.self) == 1
        else { throw .corrupt(name, "the LUKS header is not one of version 1") }
        // Examples: "xts-plain64", "cbc-essiv:sha256".
        let spec = bytes.text(40..<72).split(separator: "-", maxSplits: 1).map(String.init)
        let keyBytes = Int(bytes.bigEndian(at: 108, as: UInt32.self))
        guard spec.count == 2, (1...1024).contains(keyBytes) else {
            throw .corrupt(name, "the LUKS header names no cipher")
        }
        mode = spec[0]
        let generator = spec[1].split(separator: ":", maxSplits: 1).map(String.init)
        startValue = generator.first ?? ""
        startValueHash = generator.count == 2 ? generator[1] : nil
        // XTS uses two keys of the same length.
        cipher = "\(bytes.text(8..<40))-\(keyBytes * 8 / (spec[0] == "xts" ? 2 : 1))"
        hash = bytes.text(72..<104)
        payloadOffset = Int64(bytes.bigEndian(at: 104, as: UInt32.self)) * 512
        masterKeyIterations = bytes.bigEndian(at: 164, as: UInt32.self)
        uuid = bytes.text(168..<208)
        slots = try stride(from: 208, to: Self.length, by: 48).map { start throws(ImageError) in
            let state = bytes.bigEndian(at: start, as: UInt32.self)
            let stripes = bytes.bigEndian(at: start + 44, as: UInt32.self)
            guard state == Self.enabledKey || state == Self.disabledKey, stripes == Self.stripes
            else {
                throw .corrupt(name, "a key slot of the LUKS header is damaged")
            }
            return KeySlot(
                iterations: state == Self.enabledKey
                    ? bytes.bigEndian(at: start + 4, as: UInt32.self) : nil,
                stripes: stripes,
                keyOffset: Int64(bytes.bigEndian(at: start + 40, as: UInt32.self)) * 512)
        }
    }
}
