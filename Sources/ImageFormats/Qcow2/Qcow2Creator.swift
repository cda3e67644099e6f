import DiskImage
import ImageStorage

/// Makes qcow2 images.
struct Qcow2Creator: ImageCreator {
    let canCompress = true
    var options: [OptionDescription] { Qcow2OptionTable.options }

    func newImage(_ options: TypedOptions) throws(ImageError) -> any NewImage {
        var parameters = try ImageParameters(options) { name throws(ImageError) in
            guard let mode = Preallocation(rawValue: name) else {
                throw Self.notAccepted("preallocation", name)
            }
            return mode
        }
        let isEncrypted =
            options.hasKeys(startingWith: Qcow2Encryption.prefix)
            || options.isOn("encryption") == true
        guard !parameters.isDataFileRaw || !isEncrypted else {
            throw .invalid("a raw data file cannot be encrypted (data_file_raw=on)")
        }
        let encryption = try Self.encryption(options)
        parameters.isEncrypted = encryption != nil
        return NewQcow2Image(
            parameters: parameters, options: try Self.qcow2Options(options, parameters),
            encryption: encryption.map { .new($0) })
    }

    /// - Returns: nil for an image that is not encrypted.
    private static func encryption(_ options: TypedOptions) throws(ImageError) -> LUKSOptions? {
        let prefix = Qcow2Encryption.prefix
        let old = options.isOn("encryption")
        let format = options.text(prefix + "format") ?? (old == true ? "aes" : nil)
        guard old == nil || options.text(prefix + "format") == nil else {
            throw .invalid(
                "'encrypt.format' and its alias 'encryption' can't be used at the same time")
        }
        switch format {
        case "luks": return try LUKSOptions(options, prefix: prefix)
        case "aes":
            throw .invalid(
                "images encrypted by 'aes' can only be read, because it is not safe: use "
                    + "encrypt.format=luks")
        case let format?: throw notAccepted("format", format)
        case nil: break
        }
        guard !options.hasKeys(startingWith: prefix) else {
            throw .invalid("Parameter 'encrypt.format' is missing")
        }
        return nil
    }

    private static func qcow2Options(
        _ options: TypedOptions, _ parameters: ImageParameters
    ) throws(ImageError) -> Qcow2Options {
        var qcow2 = layout(options)
        qcow2.preallocation = parameters.preallocation
        qcow2.dataFile = parameters.dataFile
        qcow2.isDataFileRaw = parameters.isDataFileRaw
        guard parameters.backingFile == nil || !qcow2.isDataFileRaw else {
            throw .invalid("Backing file and data-file-raw cannot be used at the same time")
        }
        qcow2.lazyRefcounts = options.isOn("lazy_refcounts") ?? false
        if let compat = options.text("compat") { qcow2.version = try version(compat) }
        if let name = options.text("compression_type") {
            guard let type = Qcow2Compression(rawValue: name) else {
                throw notAccepted("compression-type", name)
            }
            qcow2.compression = type
        }
        if let text = options.text("compression_level") {
            guard let level = Int(text) else { throw notAccepted("compression_level", text) }
            qcow2.compressionLevel = level
        }
        try qcow2.check()
        return qcow2
    }

    /// The options that shape clusters and tables, as yet unchecked.
    private static func layout(_ options: TypedOptions) -> Qcow2Options {
        var qcow2 = Qcow2Options()
        qcow2.clusterSize = options.number("cluster_size") ?? qcow2.clusterSize
        qcow2.refcountBits = options.number("refcount_bits").map { Int($0) } ?? qcow2.refcountBits
        qcow2.extendedL2 = options.isOn("extended_l2") ?? qcow2.extendedL2
        return qcow2
    }

    private static func version(_ value: String) throws(ImageError) -> Int {
        switch value {
        case "0.10", "v2": return 2
        case "1.1", "v3": return 3
        default: throw notAccepted("version", value)
        }
    }

    private static func notAccepted(_ name: String, _ value: String) -> ImageError {
        .invalid("Parameter '\(name)' does not accept value '\(value)'")
    }

    func existingImage(
        _ image: any Image, leavesBacking: Bool
    ) throws(ImageError) -> any WrittenImage {
        let encryption = (image as? Qcow2Source)?.encryption
        guard encryption?.canWrite ?? true else {
            throw .unsupported(
                image.storage.name, "an image that is encrypted by 'aes' cannot be written into")
        }
        return ExistingQcow2Image(leavesBacking: leavesBacking, encryption: encryption)
    }

    func measure(
        _ disk: MeasuredDisk, _ options: TypedOptions
    ) async throws -> MeasuredSize {
        let asked = try Self.measuredOptions(options)
        let clusterSize = asked.clusterSize
        let rounded = disk.size.roundedUp(to: clusterSize)
        let geometry = Qcow2Geometry(asked, virtualSize: rounded)
        guard geometry.l1Entries <= Qcow2Header.maximumL1Entries else {
            throw ImageError.invalid(
                "The image size is too large (try using a larger cluster size)")
        }
        // Metadata does not tell which part of the disk the backing file will provide.
        let isWhole =
            asked.preallocation.takesBlocks || options.text("backing_file") != nil && disk.isImage
        let data = isWhole ? rounded : try await disk.allocatedData(clusterSize)
        let luks =
            options.text("encrypt.format") == "luks"
            ? try LUKSOptions(options, prefix: Qcow2Encryption.prefix).payloadOffset : 0
        let fullyAllocated =
            geometry.fullyAllocatedSize(refcountBits: asked.refcountBits)
            + luks.roundedUp(to: clusterSize)
        return MeasuredSize(
            required: fullyAllocated - rounded + data, fullyAllocated: fullyAllocated,
            bitmaps: asked.version >= 3 ? try await disk.bitmapsSize(clusterSize) : nil)
    }

    /// Reads the options that change the size. Others pass unchecked, and the messages differ from
    /// those of `create`: as in qemu-img.
    private static func measuredOptions(
        _ options: TypedOptions
    ) throws(ImageError) -> Qcow2Options {
        var qcow2 = layout(options)
        try qcow2.checkClusterSize()
        if let compat = options.text("compat") {
            guard ["0.10", "1.1"].contains(compat) else {
                throw .invalid("Invalid compatibility level: '\(compat)'")
            }
            qcow2.version = try version(compat)
        }
        try qcow2.checkRefcountBits(remedy: "compat=1.1")
        if let mode = options.text("preallocation") {
            qcow2.preallocation = try Preallocation(option: mode)
        }
        return qcow2
    }
}

private struct NewQcow2Image: NewImage {
    let parameters: ImageParameters
    var options: Qcow2Options
    /// nil leaves the image unencrypted.
    var encryption: LUKSPlan?
    var canHaveBitmaps: Bool { options.version >= 3 }
    private var data: (any WritableStorage)?

    init(parameters: ImageParameters, options: Qcow2Options, encryption: LUKSPlan?) {
        self.parameters = parameters
        self.options = options
        self.encryption = encryption
    }

    mutating func setData(_ storage: any WritableStorage) { data = storage }

    mutating func setBacking(_ backing: BackingName, virtualSize: Int64) {
        options.backing = Qcow2Options.Backing(
            file: backing.name, format: backing.format, virtualSize: virtualSize)
    }

    func checkBackedConversion() throws(ImageError) {
        guard options.preallocation == .off || options.extendedL2 else {
            throw .invalid(
                "Backing file and preallocation can only be used at the same time if "
                    + "extended_l2 is on")
        }
    }

    func check() throws(ImageError) { try options.check() }

    /// The options with a new master key, if the image is to be encrypted. Making one takes long.
    private func encrypted() async throws -> Qcow2Options {
        guard let encryption else { return options }
        var options = options
        options.encryption = try await encryption.makeVolume()
        return options
    }

    func makeTarget(
        on storage: any WritableStorage, size: Int64, _ settings: TargetSettings
    ) async throws -> any ImageTarget {
        if storage.traits.isStream {
            guard encryption == nil else {
                throw ImageError.unsupported(
                    storage.name, "an encrypted qcow2 image cannot be written to a pipe yet")
            }
            return try Qcow2StreamTarget(storage, virtualSize: size, options, settings)
        }
        let options = try await encrypted()
        if options.preallocation != .off, options.backing != nil {
            return try await preallocatedOverlay(on: storage, size: size, settings, options)
        }
        let target = try Qcow2Target(
            storage: storage, virtualSize: size, options: options, compress: settings.compress,
            minSparse: Int(settings.minSparse), data: data)
        try await target.prepare()
        guard let data, options.placesAhead, options.encryption == nil else { return target }
        return Qcow2DataFileTarget(
            tables: target,
            data: RawTarget(
                storage: data, minSparse: Int(settings.minSparse),
                looksForZeros: settings.looksForZeros, readsAsZero: settings.readsAsZero))
    }

    /// Begins an image whose clusters have places and show the backing file until they are
    /// written: they are written like those of an existing image.
    private func preallocatedOverlay(
        on storage: any WritableStorage, size: Int64, _ settings: TargetSettings,
        _ options: Qcow2Options
    ) async throws -> any ImageTarget {
        try await makeEmpty(on: storage, size: size, options)
        var settings = settings
        settings.readsAsZero = false
        return try await Qcow2InPlaceTarget(
            storage, settings, data: data, leavesBacking: true,
            encryption: options.encryption.map { Qcow2Encryption($0) })
    }

    func makeEmpty(on storage: any WritableStorage, size: Int64) async throws {
        try await makeEmpty(on: storage, size: size, encrypted())
    }

    private func makeEmpty(
        on storage: any WritableStorage, size: Int64, _ options: Qcow2Options
    ) async throws {
        guard options.placesAhead else {
            return try await EmptyQcow2Image(on: storage, data: data, options)
                .write(virtualSize: size)
        }
        let target = try Qcow2Target(
            storage: storage, virtualSize: size, options: options, compress: false,
            minSparse: 4096, writesData: false, data: data)
        try await target.prepare()
        try await target.finish(virtualSize: size)
    }
}

private struct ExistingQcow2Image: WrittenImage {
    let leavesBacking: Bool
    /// nil if the image is not encrypted.
    let encryption: Qcow2Encryption?
    private var data: (any WritableStorage)?
    // Version 2 is met when they are written.
    let canHaveBitmaps = true

    init(leavesBacking: Bool, encryption: Qcow2Encryption?) {
        self.leavesBacking = leavesBacking
        self.encryption = encryption
    }

    mutating func setData(_ storage: any WritableStorage) { data = storage }

    func makeTarget(
        on storage: any WritableStorage, size: Int64, _ settings: TargetSettings
    ) async throws -> any ImageTarget {
        try await Qcow2InPlaceTarget(
            storage, settings, data: data, leavesBacking: leavesBacking, encryption: encryption)
    }
}
