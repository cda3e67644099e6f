import DiskImage
import ImageStorage

/// The LUKS header (version 1) of an encrypted image, without its keys.
///
/// Source: "LUKS On-Disk Format Specification", version 1.2.3, section 2.1 ("PHDR").
public struct LUKSHeader: Sendable, Equatable {
    public struct KeySlot: Sendable, Equatable {
        /// Number of iterations that derive the key of the slot; nil for a slot without a key.
        public let iterations: UInt32?
        let salt: [UInt8]
        public let stripes: UInt32
        /// Place of the key material in bytes from the start of the LUKS header.
        public let keyOffset: Int64

        public var isActive: Bool { iterations != nil }
    }

    /// Name of the cipher without the length of its key, such as `aes`.
    let cipherName: String
    /// Mode of the cipher, such as `xts`.
    public let mode: String
    /// Generator of the start value of a sector, such as `plain64` or `essiv`.
    public let startValue: String
    /// Hash that the generator uses, `sha256` in `essiv:sha256`; nil if it uses none.
    public let startValueHash: String?
    public let hash: String
    public let uuid: String
    /// Length of the master key in bytes.
    let keyLength: Int
    /// Offset of the payload in bytes from the start of the LUKS header.
    public let payloadOffset: Int64
    /// The digest that PBKDF2 makes of the master key with this salt and number of iterations.
    let masterKeyDigest: [UInt8]
    let masterKeySalt: [UInt8]
    public let masterKeyIterations: UInt32
    public let slots: [KeySlot]

    /// Name of the cipher with the length of the key in bits, such as `aes-256`.
    public var cipher: String {
        // XTS uses two keys of the same length.
        "\(cipherName)-\(keyLength * 8 / (mode == CipherSpec.Mode.xts.rawValue ? 2 : 1))"
    }

    static let length = 592
    static let magic = Array("LUKS".utf8) + [0xba, 0xbe]
    static let version: UInt16 = 1
    static let enabledKey: UInt32 = 0x00ac_71f3
    static let disabledKey: UInt32 = 0x0000_dead
    static let stripes: UInt32 = 4000
    static let slotCount = 8
    static let slotsOffset = 208
    static let slotLength = 48
    static let saltLength = 32
    static let digestLength = 20
    /// The first key material begins here, in bytes.
    static let firstKeyOffset: Int64 = 4096
    /// Length of the longest master key in bytes: two of 256 bits.
    private static let longestKey = 64

    /// Whether a storage begins with such a header.
    static func begins(_ start: RawSpan) -> Bool {
        start.byteCount >= 8
            && magic.indices.allSatisfy {
                start.unsafeLoad(fromByteOffset: $0, as: UInt8.self) == magic[$0]
            }
            && start.bigEndian(at: 6, as: UInt16.self) == version
    }

    /// Reads and checks the header at the start of a storage.
    ///
    /// - Throws: `ImageError` if there is none, or if its numbers contradict each other.
    static func read(from storage: any Storage) async throws -> LUKSHeader {
        guard storage.size >= length else {
            throw ImageError.corrupt(storage.name, "the LUKS header is too short")
        }
        let bytes = try await storage.readBytes(
            at: HostOffset(0), count: Int64(length), "LUKS header")
        return try LUKSHeader(bytes, storage.name)
    }

    init(_ bytes: [UInt8], _ name: String) throws(ImageError) {
        guard bytes.count >= Self.length, Self.begins(bytes.span.bytes) else {
            throw .corrupt(name, "the LUKS header is not one of version 1")
        }
        for (field, what) in [(8..<40, "cipher"), (40..<72, "cipher mode"), (72..<104, "hash")] {
            guard bytes[field].contains(0) else {
                throw .corrupt(name, "the name of the \(what) in the LUKS header has no end")
            }
        }
        cipherName = bytes.text(8..<40)
        // Examples: "xts-plain64", "cbc-essiv:sha256".
        let spec = bytes.text(40..<72).split(separator: "-", maxSplits: 1).map(String.init)
        keyLength = Int(bytes.bigEndian(at: 108, as: UInt32.self))
        guard spec.count == 2, (1...Self.longestKey).contains(keyLength) else {
            throw .corrupt(name, "the LUKS header names no cipher")
        }
        mode = spec[0]
        let generator = spec[1].split(separator: ":", maxSplits: 1).map(String.init)
        startValue = generator.first ?? ""
        startValueHash = generator.count == 2 ? generator[1] : nil
        hash = bytes.text(72..<104)
        payloadOffset = Int64(bytes.bigEndian(at: 104, as: UInt32.self)) * guestSectorSize
        masterKeyDigest = Array(bytes[112..<112 + Self.digestLength])
        masterKeySalt = Array(bytes[132..<132 + Self.saltLength])
        masterKeyIterations = bytes.bigEndian(at: 164, as: UInt32.self)
        uuid = bytes.text(168..<208)
        slots = try (0..<Self.slotCount).map { number throws(ImageError) in
            try Self.slot(number, bytes, name)
        }
        try checkPlaces(name)
    }

    private static func slot(
        _ number: Int, _ bytes: [UInt8], _ name: String
    ) throws(ImageError) -> KeySlot {
        let start = slotsOffset + number * slotLength
        let state = bytes.bigEndian(at: start, as: UInt32.self)
        let iterations = bytes.bigEndian(at: start + 4, as: UInt32.self)
        let stripes = bytes.bigEndian(at: start + 44, as: UInt32.self)
        guard state == enabledKey || state == disabledKey else {
            throw damaged(number, "its state is unknown", name)
        }
        guard stripes == Self.stripes else {
            throw damaged(number, "it has \(stripes) stripes", name)
        }
        guard state == disabledKey || iterations > 0 else {
            throw damaged(number, "it has no iterations", name)
        }
        return KeySlot(
            iterations: state == enabledKey ? iterations : nil,
            salt: Array(bytes[start + 8..<start + 8 + saltLength]), stripes: stripes,
            keyOffset: Int64(bytes.bigEndian(at: start + 40, as: UInt32.self)) * guestSectorSize)
    }

    private static func damaged(_ slot: Int, _ reason: String, _ name: String) -> ImageError {
        .corrupt(name, "key slot \(slot) of the LUKS header is damaged: \(reason)")
    }

    /// Length of a slot's key material in bytes, in whole sectors.
    var materialLength: Int64 { Self.materialLength(keyLength: keyLength) }

    static func materialLength(keyLength: Int) -> Int64 {
        (Int64(keyLength) * Int64(stripes)).roundedUp(to: guestSectorSize)
    }

    /// Throws if key material lies in the header, in the payload, or in other key material.
    private func checkPlaces(_ name: String) throws(ImageError) {
        let places = slots.map { $0.keyOffset..<$0.keyOffset + materialLength }
        for (number, place) in places.enumerated() {
            guard place.lowerBound >= Self.firstKeyOffset else {
                throw Self.damaged(number, "its key lies in the header", name)
            }
            guard place.upperBound <= payloadOffset else {
                throw Self.damaged(number, "its key lies in the payload", name)
            }
            guard !places[..<number].contains(where: { place.overlaps($0) }) else {
                throw Self.damaged(number, "its key overlaps that of another one", name)
            }
        }
    }
}

extension LUKSHeader {
    /// The cipher of the payload and of the key material.
    ///
    /// - Throws: `ImageError` for one that is not supported.
    func cipherSpec(_ name: String) throws(ImageError) -> CipherSpec {
        guard let mode = CipherSpec.Mode(rawValue: mode) else {
            throw .unsupported(name, "Algorithm '\(cipher)' with '\(mode)' mode not supported")
        }
        let generator: CipherSpec.StartValue
        switch (startValue, startValueHash) {
        case ("plain", nil): generator = .plain
        case ("plain64", nil): generator = .plain64
        case ("essiv", let hash?): generator = .essiv(hash: hash)
        default:
            throw .unsupported(name, "the start values '\(startValue)' are not supported")
        }
        let spec = CipherSpec(
            cipher: cipherName, mode: mode, startValue: generator, keyLength: keyLength)
        do { try spec.check() } catch {
            throw ImageError(error.kind, path: error.path ?? name, error.message)
        }
        guard CryptoLibrary.hashLength(hash) != nil else {
            throw .unsupported(name, "Hash algorithm '\(hash)' is not supported")
        }
        return spec
    }

    // MARK: For info

    /// The facts that `info` shows, in qemu's order.
    func details(isPartOfImage: Bool) -> [JSONValue.Member] {
        var members: [JSONValue.Member] = [
            .init("ivgen-alg", .string(startValue)), .init("hash-alg", .string(hash)),
            .init("cipher-alg", .string(cipher)), .init("uuid", .string(uuid)),
        ]
        if let startValueHash {
            members.append(.init("ivgen-hash-alg", .string(startValueHash)))
        }
        if isPartOfImage { members.append(.init("format", .string("luks"))) }
        return members + [
            .init("cipher-mode", .string(mode)), .init("slots", .array(slots.map(\.facts))),
            .init("payload-offset", .integer(payloadOffset)),
            .init("master-key-iters", .integer(Int64(masterKeyIterations))),
        ]
    }
}

extension LUKSHeader.KeySlot {
    fileprivate var facts: JSONValue {
        guard let iterations else {
            return .object([
                .init("active", .bool(false)), .init("key-offset", .integer(keyOffset)),
            ])
        }
        return .object([
            .init("active", .bool(true)), .init("iters", .integer(Int64(iterations))),
            .init("key-offset", .integer(keyOffset)), .init("stripes", .integer(Int64(stripes))),
        ])
    }
}
