import DiskImage
import ImageFormats
import ImageStorage

/// What `-o` says, understood: what a new image will be like.
package struct ImageParameters: Sendable {
    package var qcow2 = Qcow2Options()
    /// Of the guest disk, in bytes; nil takes it from the source or the backing file.
    package var size: Int64?
    package var backingFile: ImageName?
    package var backingFormat: String?
    package var preallocation = Preallocation.off
    package var attributes = FileAttributes()

    /// What the file that holds an image is asked for.
    package struct FileAttributes: Sendable, Equatable {
        var noCopyOnWrite = false
        /// In bytes; nil or 0 leaves it to the file system.
        var extentSizeHint: Int64?

        /// Does what can be done; none of it changes what the image holds.
        ///
        /// - Returns: what the file system could not do, in words; nil mostly.
        package func apply(to storage: any Storage) -> String? {
            guard let file = storage as? FileStorage, !file.traits.isDevice else { return nil }
            if noCopyOnWrite { file.disableCopyOnWrite() }
            guard let extentSizeHint, extentSizeHint > 0 else { return nil }
            return file.setExtentSizeHint(extentSizeHint)
                .map { "Failed to set extent size hint: \($0)" }
        }
    }

    package init(_ options: CreationOptions, for format: ImageFormat) throws(ImageError) {
        try self.init(TypedOptions(options, for: format))
    }

    /// - Throws: `ImageError` in qemu-img's words, or for what cannot be written yet.
    package init(_ options: TypedOptions) throws(ImageError) {
        size = try options.number("size").map(checkedDiskSize)
        backingFile = options.name("backing_file")
        backingFormat = options.text("backing_fmt")
        preallocation = try Self.preallocation(options)
        attributes.noCopyOnWrite = options.isOn("nocow") ?? false
        attributes.extentSizeHint = options.number("extent_size_hint")
        if let hint = attributes.extentSizeHint, hint > UInt32.max {
            throw .invalid("Extent size hint is too large")
        }
        try Self.refuseMissing(options)
        guard options.format == .qcow2 else { return }
        qcow2.preallocation = preallocation
        qcow2.clusterSize = options.number("cluster_size") ?? Qcow2Options.defaultClusterSize
        qcow2.refcountBits = Int(options.number("refcount_bits") ?? 16)
        qcow2.lazyRefcounts = options.isOn("lazy_refcounts") ?? false
        qcow2.extendedL2 = options.isOn("extended_l2") ?? false
        if let compat = options.text("compat") { qcow2.version = try Self.version(compat) }
        if let name = options.text("compression_type") {
            guard let type = Qcow2Compression(rawValue: name) else {
                throw Self.notAccepted("compression-type", name)
            }
            qcow2.compression = type
        }
        if let text = options.text("compression_level") {
            guard let level = Int(text) else { throw Self.notAccepted("compression_level", text) }
            qcow2.compressionLevel = level
        }
        try qcow2.check()
    }

    private static func preallocation(
        _ options: TypedOptions
    ) throws(ImageError) -> Preallocation {
        guard let name = options.text("preallocation") else { return .off }
        let mode = Preallocation(rawValue: name)
        switch (options.format, mode) {
        case (.qcow2, let mode?): return mode
        case (.qcow2, nil): throw notAccepted("preallocation", name)
        case (.raw, .metadata): throw .invalid("Unsupported preallocation mode: metadata")
        case (.raw, let mode?): return mode
        case (.raw, nil): throw .invalid("invalid parameter value: \(name)")
        }
    }

    /// Keys that qemu-img knows and we do not write yet; saying that they are off does no harm.
    private static func refuseMissing(_ options: TypedOptions) throws(ImageError) {
        for option in OptionSchema.options(of: options.format) {
            let isMissing =
                option.name.hasPrefix("encrypt") || option.name.hasPrefix("data_file")
            guard isMissing, let value = options.text(option.name),
                options.isOn(option.name) != false
            else { continue }
            throw .invalid("option '\(option.name)=\(value)' is not supported yet")
        }
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
}
