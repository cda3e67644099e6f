import DiskImage
import ImageStorage

/// The key slots of a LUKS header that is changed where it stands. At every moment of a change some
/// slot opens the disk, unless all of them are to be erased.
struct LUKSKeySlots {
    private let storage: any WritableStorage
    /// Offset of the LUKS header in the storage, in bytes.
    private let start: Int64
    private let header: LUKSHeader
    /// The bytes from the start of the LUKS header on, to read.
    private let part: any Storage
    private let masterKey: SecretBytes
    /// The numbers of the slots that hold a key.
    private var active: [Int]

    /// - Parameter place: of the LUKS header and all key material, in bytes; nil is all of the
    ///   storage.
    /// - Throws: `ImageError` for a wrong passphrase, or `CancellationError`.
    init(
        _ storage: any WritableStorage, in place: Range<Int64>? = nil, passphrase: SecretBytes
    ) async throws {
        self.storage = storage
        start = place?.lowerBound ?? 0
        part =
            if let place {
                try StoragePart(of: storage, offset: start, size: Int64(place.count))
            } else { storage }
        header = try await LUKSHeader.read(from: part)
        masterKey = try await header.masterKey(passphrase, in: part)
        active = header.slots.indices.filter { [header] in header.slots[$0].isActive }
    }

    /// - Parameter force: overwrites slots that hold a key, and erases the last one.
    /// - Throws: `ImageError` in qemu-img's words, or `CancellationError`.
    mutating func amend(_ amendment: LUKSAmendment, force: Bool) async throws {
        if amendment.activates {
            try await activate(amendment, force: force)
        } else {
            try await erase(amendment, force: force)
        }
    }

    // MARK: Adding keys

    private mutating func activate(_ amendment: LUKSAmendment, force: Bool) async throws {
        guard let secret = amendment.newSecret else {
            throw ImageError.invalid("'new-secret' is required to activate a keyslot")
        }
        guard amendment.oldSecret == nil else {
            throw ImageError.invalid("'old-secret' must not be given when activating keyslots")
        }
        guard let slot = try amendment.slot() ?? freeSlot else {
            throw ImageError.invalid("Can't add a keyslot - all keyslots are in use")
        }
        guard force || !active.contains(slot) else {
            throw ImageError.invalid(
                "Refusing to overwrite active keyslot \(slot) - please erase it first")
        }
        let passphrase = try amendment.secrets.passphrase(secret, prefix: "")
        let key = try LUKSKey(
            masterKey, passphrase: passphrase, header.cipherSpec(storage.name), hash: header.hash,
            time: LUKSKey.checkedTime(amendment.iterationTime ?? LUKSKey.usualTime))
        guard active.contains(slot) else { return try await store(key, in: slot) }
        // The slot opens nothing while it is overwritten, so another one does meanwhile.
        let spare = freeSlot
        if let spare { try await store(key, in: spare) }
        try await erase([slot])
        try await store(key, in: slot)
        if let spare { try await erase([spare]) }
    }

    private var freeSlot: Int? { header.slots.indices.first { !active.contains($0) } }

    /// Writes a key to a slot that holds none: the material first, then what activates it.
    private mutating func store(_ key: LUKSKey, in slot: Int) async throws {
        try await write(key.material, at: header.slots[slot].keyOffset)
        try await storage.flush()
        try await writeState(key, of: slot)
        try await storage.flush()
        active.append(slot)
    }

    // MARK: Erasing keys

    private mutating func erase(_ amendment: LUKSAmendment, force: Bool) async throws {
        try amendment.checkErasing()
        let passphrase = try amendment.oldSecret.map { id throws(ImageError) in
            try amendment.secrets.passphrase(id, prefix: "")
        }
        if let slot = try amendment.slot() {
            if let passphrase, try await !opens(slot, passphrase) {
                throw ImageError.invalid(
                    "Given keyslot \(slot) doesn't contain the given old password for erase "
                        + "operation")
            }
            guard force || active.contains(slot) else {
                throw ImageError.invalid("Given keyslot \(slot) is already erased (inactive)")
            }
            guard force || active.count > 1 else {
                throw ImageError.invalid(
                    "Attempt to erase the only active keyslot \(slot) which will erase all the "
                        + "data in the image irreversibly - refusing operation")
            }
            return try await erase([slot])
        }
        guard let passphrase else {
            throw ImageError.invalid(
                "To erase keyslot(s), either explicit keyslot index or the password currently "
                    + "contained in them must be given")
        }
        var found: [Int] = []
        for slot in active where try await opens(slot, passphrase) { found.append(slot) }
        guard !found.isEmpty else {
            throw ImageError.invalid("No keyslots match given (old) password for erase operation")
        }
        guard force || found.count < active.count else {
            throw ImageError.invalid(
                "All the active keyslots match the (old) password that was given and erasing them "
                    + "will erase all the data in the image irreversibly - refusing operation")
        }
        try await erase(found)
    }

    private func opens(_ slot: Int, _ passphrase: SecretBytes) async throws -> Bool {
        try await header.masterKey(ofSlot: slot, passphrase, in: part) != nil
    }

    /// Erases slots. Their state goes first, so that none of them is ever half a key. Then random
    /// bytes replace the material, without which the passphrase is worth nothing even to those who
    /// have a copy of the header.
    private mutating func erase(_ slots: [Int]) async throws {
        for slot in slots { try await writeState(nil, of: slot) }
        try await storage.flush()
        active.removeAll { slots.contains($0) }
        for slot in slots {
            try await write(
                try CryptoLibrary.randomBytes(Int(header.materialLength)),
                at: header.slots[slot].keyOffset)
        }
        try await storage.flush()
    }

    // MARK: Writing

    private func writeState(_ key: LUKSKey?, of slot: Int) async throws {
        try await write(
            LUKSKey.state(key),
            at: Int64(LUKSHeader.slotsOffset + slot * LUKSHeader.slotLength))
    }

    /// - Parameter offset: in bytes from the start of the LUKS header.
    private func write(_ bytes: [UInt8], at offset: Int64) async throws {
        try await storage.writeBytes(bytes, at: start + offset)
    }
}

/// The change of key slots that `amend` is asked for.
struct LUKSAmendment: Sendable {
    /// Whether a key is added; otherwise keys are erased.
    let activates: Bool
    /// Ids of the secrets: the new passphrase, and that of the slots to erase.
    let newSecret: String?
    let oldSecret: String?
    /// In milliseconds.
    let iterationTime: Int64?
    let secrets: Secrets
    private let number: Int64?

    /// - Parameter prefix: of the options: `encrypt.` for qcow2.
    /// - Throws: `ImageError` in qemu-img's words.
    init(_ options: TypedOptions, prefix: String) throws(ImageError) {
        switch options.text(prefix + "state") {
        case "active": activates = true
        case "inactive": activates = false
        case let other?: throw .invalid("Parameter 'state' does not accept value '\(other)'")
        case nil: throw .invalid("Parameter 'state' is missing")
        }
        newSecret = options.text(prefix + "new-secret")
        oldSecret = options.text(prefix + "old-secret")
        number = options.number(prefix + "keyslot")
        iterationTime = options.number(prefix + "iter-time")
        secrets = options.secrets
    }

    /// The number of the slot to change; nil if none is named.
    func slot() throws(ImageError) -> Int? {
        guard let number else { return nil }
        guard (0..<Int64(LUKSHeader.slotCount)).contains(number) else {
            throw .invalid(
                "Invalid keyslot \(number) specified, must be between 0 and "
                    + "\(LUKSHeader.slotCount - 1)")
        }
        return Int(number)
    }

    /// Throws if an option is given that makes no sense where keys are erased.
    func checkErasing() throws(ImageError) {
        let given = [("new-secret", newSecret != nil), ("iter-time", iterationTime != nil)]
        guard let (option, _) = given.first(where: \.1) else { return }
        throw .invalid("'\(option)' must not be given when erasing keyslots")
    }

    /// The options, in qemu's words.
    static func options(prefix: String) -> [OptionDescription] {
        [
            OptionDescription(
                prefix + "keyslot", .number, "Select a single keyslot to modify explicitly"),
            OptionDescription(
                prefix + "new-secret", .text,
                "New secret to set in the matching keyslots. Empty string to erase"),
            OptionDescription(
                prefix + "old-secret", .text, "Select all keyslots that match this password"),
            OptionDescription(
                prefix + "state", .text,
                "Select new state of affected keyslots (active/inactive)"),
        ] + OptionDescription.encryption(prefix: prefix).filter { $0.name.hasSuffix("iter-time") }
    }
}

/// Changes the key slots of LUKS images.
struct LUKSAmender: ImageAmender {
    var options: [OptionDescription] { LUKSAmendment.options(prefix: "") }

    func amend(
        _ storage: any WritableStorage, _ options: TypedOptions, key: ImageKey, force: Bool,
        openBacking: (BackingName) async throws -> any ImageSource,
        openData: (any Image) throws -> (any WritableStorage)?
    ) async throws {
        let passphrase = try key.passphrase(prefix: "", image: storage.name)
        var slots = try await LUKSKeySlots(storage, passphrase: passphrase)
        try await slots.amend(LUKSAmendment(options, prefix: ""), force: force)
    }
}
