import DiskImage
import ImageStorage

/// Changes options of existing qcow2 images, in the order of qemu: what needs version 3 comes after
/// the upgrade, and what prevents version 2 goes before the downgrade.
struct Qcow2ImageAmender: ImageAmender {
    var options: [OptionDescription] {
        let shared = [
            "backing_file", "backing_fmt", "compat", "data_file", "data_file_raw",
            "encrypt.iter-time", "lazy_refcounts", "refcount_bits", "size",
        ]
        return Qcow2OptionTable.options.filter { shared.contains($0.name) }
            .map { OptionDescription($0.name, $0.kind, $0.help) } + Self.keyslotOptions
    }

    private static let keyslotOptions = [
        OptionDescription(
            "encrypt.keyslot", .number, "Select a single keyslot to modify explicitly"),
        OptionDescription(
            "encrypt.new-secret", .text,
            "New secret to set in the matching keyslots. Empty string to erase"),
        OptionDescription(
            "encrypt.old-secret", .text, "Select all keyslots that match this password"),
        OptionDescription(
            "encrypt.state", .text, "Select new state of affected keyslots (active/inactive)"),
    ]

    func amend(
        _ storage: any WritableStorage, _ options: TypedOptions,
        openBacking: (BackingName) async throws -> any ImageSource,
        openData: (any Image) throws -> (any WritableStorage)?
    ) async throws {
        let header = try await Qcow2Header.read(from: storage)
        try header.requireWritable(storage.name)
        guard header.encryptionFormat == nil else {
            throw ImageError.unsupported(
                storage.name, "amending an encrypted image is not supported yet")
        }
        let wanted = try Qcow2Amendment(options, header)
        // Before it gets another name.
        let data = wanted.size == nil ? nil : try openData(try await Qcow2Source(storage))
        if wanted.version > header.version {
            try await Qcow2SnapshotEditor.edit(storage, header) { try await $0.upgrade() }
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
            let source = try await Qcow2Source(storage)
            var backing: (any ImageSource)?
            if let name = source.backing { backing = try await openBacking(name) }
            var resizer = try await Qcow2Resizer(
                storage: storage, header: source.header, backing: backing, data: data)
            try await resizer.resizeWithBitmaps(to: size, preallocation: .off)
        }
        if wanted.version < header.version {
            var downgrade = try await Qcow2Downgrade(storage)
            try await downgrade.run()
        }
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

    /// - Throws: `ImageError` in qemu-img's words.
    init(_ options: TypedOptions, _ header: Qcow2Header) throws(ImageError) {
        version =
            switch options.text("compat") {
            case nil: header.version
            case "0.10", "v2": 2
            case "1.1", "v3": 3
            case let other?: throw .invalid("Unknown compatibility level \(other)")
            }
        if options.keys.contains(where: { $0.hasPrefix("encrypt.") }) {
            throw .invalid("Can't amend encryption options - encryption not present")
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
        let bytes = try options.number("size").map(checkedDiskSize)
        size = bytes == 0 ? nil : bytes
        backingFile = options.name("backing_file")
        backingFormat = options.text("backing_fmt")
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
