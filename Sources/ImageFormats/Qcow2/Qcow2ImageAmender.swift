import DiskImage
import ImageStorage

/// Changes options of existing qcow2 images, in the order of qemu: what needs version 3 comes after
/// the upgrade, and what prevents version 2 goes before the downgrade.
struct Qcow2ImageAmender: ImageAmender {
    var options: [OptionDescription] {
        let shared = [
            "backing_file", "backing_fmt", "compat", "data_file", "data_file_raw",
            "lazy_refcounts", "refcount_bits", "size",
        ]
        return Qcow2OptionTable.options.filter { shared.contains($0.name) }
            .map { OptionDescription($0.name, $0.kind, $0.help) }
            + LUKSAmendment.options(prefix: Qcow2Encryption.prefix)
    }

    func amend(
        _ storage: any WritableStorage, _ options: TypedOptions, key: ImageKey, force: Bool,
        openBacking: (BackingName) async throws -> any ImageSource,
        openData: (any Image) throws -> (any WritableStorage)?
    ) async throws {
        let header = try await Qcow2Header.read(from: storage)
        try header.requireWritable(storage.name)
        // As in qemu-img, the passphrase has to be right.
        let encryption = try await Qcow2Encryption.open(header, in: storage, key)
        let wanted = try Qcow2Amendment(options, header)
        // Before it gets another name.
        let data =
            wanted.size == nil || !header.hasDataFile
            ? nil
            : try openData(
                try await Qcow2Source(storage, header: header, encryption: encryption))
        if wanted.version > header.version {
            try await Qcow2SnapshotEditor.edit(storage, header) { try await $0.upgrade() }
        }
        if let change = try wanted.keySlots() {
            try await amend(change, header, storage, key, force: force)
        }
        if wanted.refcountBits != header.refcountBits {
            try wanted.checkRefcountBits()
            try await Qcow2RefcountWidth(storage).change(to: wanted.refcountBits)
        }
        if wanted.dataFile != header.dataFile || wanted.isDataFileRaw != header.isDataFileRaw {
            var image = try await Qcow2WritableImage.damaged(storage)
            try await image.rewriteHeader {
                $0.dataFile = wanted.dataFile
                if !wanted.isDataFileRaw {
                    $0.autoclearFeatures &= ~Qcow2Header.AutoclearFeature.rawDataFile
                }
            }
        }
        try wanted.checkBacking(header)
        if wanted.lazyRefcounts != header.hasLazyRefcounts {
            try wanted.checkLazyRefcounts()
            var image = try await Qcow2WritableImage.damaged(storage)
            try await image.changeHeader {
                $0.compatibleFeatures ^= Qcow2Header.CompatibleFeature.lazyRefcounts
            }
        }
        if let size = wanted.size {
            let source = try await Qcow2Source(
                storage, header: Qcow2Header.read(from: storage), encryption: encryption)
            var backing: (any ImageSource)?
            if let name = source.backing { backing = try await openBacking(name) }
            var resizer = try await Qcow2Resizer(
                storage: storage, header: source.header, backing: backing, data: data,
                encryption: encryption)
            try await resizer.resizeWithBitmaps(to: size, preallocation: .off)
        }
        if wanted.version < header.version {
            var downgrade = try await Qcow2Downgrade(storage, encryption)
            try await downgrade.run()
        }
    }

    private func amend(
        _ change: LUKSAmendment, _ header: Qcow2Header, _ storage: any WritableStorage,
        _ key: ImageKey, force: Bool
    ) async throws {
        guard let place = header.encryptionHeader else { return }
        var (image, _) = try await Qcow2WritableImage.sound(
            storage, Qcow2Header.read(from: storage))
        try await image.clearUnknownFeatures()
        var slots = try await LUKSKeySlots(
            storage, in: place.range(in: storage, "LUKS header"),
            passphrase: key.passphrase(prefix: Qcow2Encryption.prefix, image: storage.name))
        try await slots.amend(change, force: force)
    }
}

/// The options that an image is to have; options that are not asked for stay.
private struct Qcow2Amendment {
    let version: Int
    let refcountBits: Int
    let lazyRefcounts: Bool
    /// The name of the data file that the image is to have; nil for none.
    let dataFile: HostPath?
    let isDataFileRaw: Bool
    /// New size of the disk in bytes; nil leaves it.
    let size: Int64?
    private let backingFile: ImageName?
    private let backingFormat: String?
    private let options: TypedOptions

    /// - Throws: `ImageError` in qemu-img's words.
    init(_ options: TypedOptions, _ header: Qcow2Header) throws(ImageError) {
        version =
            switch options.text("compat") {
            case nil: header.version
            case "0.10", "v2": 2
            case "1.1", "v3": 3
            case let other?: throw .invalid("Unknown compatibility level \(other)")
            }
        self.options = options
        if options.hasKeys(startingWith: Qcow2Encryption.prefix) {
            switch header.encryptionFormat {
            case .luks: break
            case .aes: throw .invalid("Only LUKS encryption options can be amended")
            case nil: throw .invalid("Can't amend encryption options - encryption not present")
            }
        }
        let path = try options.name("data_file")?.path()
        guard path == nil || header.hasDataFile else {
            throw .invalid("data-file can only be set for images that use an external data file")
        }
        dataFile = path.map { $0.bytes.isEmpty ? nil : $0 } ?? header.dataFile
        isDataFileRaw = options.isOn("data_file_raw") ?? header.isDataFileRaw
        guard !isDataFileRaw || header.isDataFileRaw else {
            throw .invalid("data-file-raw cannot be set on existing images")
        }
        refcountBits =
            options.number("refcount_bits").map { Int(clamping: $0) } ?? header.refcountBits
        guard refcountBits.isPowerOfTwo, refcountBits <= 64 else {
            throw .invalid("Refcount width must be a power of two and may not exceed 64 bits")
        }
        lazyRefcounts = options.isOn("lazy_refcounts") ?? header.hasLazyRefcounts
        let bytes = try options.number("size").map { size throws(ImageError) in
            try size.checkedAsDiskSize()
        }
        size = bytes == 0 ? nil : bytes
        backingFile = options.name("backing_file")
        backingFormat = options.text("backing_fmt")
    }

    /// - Returns: nil if key slots stay as they are.
    func keySlots() throws(ImageError) -> LUKSAmendment? {
        guard options.hasKeys(startingWith: Qcow2Encryption.prefix) else { return nil }
        return try LUKSAmendment(options, prefix: Qcow2Encryption.prefix)
    }

    func checkRefcountBits() throws(ImageError) {
        guard version >= 3 || refcountBits == 16 else {
            throw .invalid(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above "
                    + "(use compat=1.1 or greater)")
        }
    }

    func checkLazyRefcounts() throws(ImageError) {
        guard version >= 3 || !lazyRefcounts else {
            throw .invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above "
                    + "(use compat=1.1 or greater)")
        }
    }

    func checkBacking(_ header: Qcow2Header) throws(ImageError) {
        guard backingFile != nil || backingFormat != nil else { return }
        guard backingFile == header.backingFile, backingFormat == header.backingFormat else {
            throw .invalid(
                "Cannot amend the backing file: rebase can change it")
        }
    }
}
