import DiskImage
import Glibc
import ImageConvert
import ImageFormats
import ImageStorage
import NBDStorage

/// One `create`: a new image that holds nothing, or what its backing file holds.
///
/// `prepare` finds out what is asked for and whether it can be; `Plan.create` makes the image.
public struct ImageCreation: Sendable {
    /// A path, or the name of an NBD export.
    public var name: ImageName
    public var format: ImageFormat
    public var options = CreationOptions()
    /// Of the guest disk, in bytes; nil takes it from the options or the backing file.
    public var size: Int64?
    /// What the image will lie on (`-b`), and its format (`-F`).
    public var backingFile: ImageName?
    public var backingFormat: String?
    /// Do not look at the backing file (`-u`).
    public var skipsBackingCheck = false
    public var nbd = NBDOptions()

    public init(_ name: ImageName, format: ImageFormat) {
        self.name = name
        self.format = format
    }

    /// What is going to be made.
    public struct Plan: Sendable {
        /// What qemu-img prints: all the options, without a line break at the end.
        public let line: String
        fileprivate let name: ImageName
        fileprivate let nbd: NBDOptions
        fileprivate let typed: TypedOptions
        /// In bytes, a multiple of 512.
        fileprivate let size: Int64
        fileprivate let protected: Set<FileIdentity>
    }

    /// Reads the options, and the backing file for its size.
    ///
    /// - Throws: `ImageError`, in qemu-img's words where callers may look for them.
    public func prepare() async throws -> Plan {
        do {
            return try await plan()
        } catch let error as ImageError where error.path == nil {
            throw ImageError(error.kind, path: name.description, error.message)
        }
    }

    private func plan() async throws -> Plan {
        var options = options
        if size != nil, options.value(of: "size") != nil || hasSeveralSizes {
            throw ImageError.invalid("The image size must be specified only once")
        }
        if let backingFile { try setBacking("backing_file", backingFile.bytes, &options) }
        if let backingFormat { try setBacking("backing_fmt", Array(backingFormat.utf8), &options) }
        let typed = try TypedOptions(options, for: format)
        // A name that cannot be created is an error before anything is printed.
        if !NBDStorage.isName(name) { _ = try name.path() }
        let backing = try await openBacking(typed)
        guard let bytes = size ?? typed.number("size") ?? backing?.virtualSize else {
            throw ImageError.invalid("Image creation needs a size parameter")
        }
        return Plan(
            line: typed.creationLine(name, size: bytes), name: name, nbd: nbd, typed: typed,
            size: try checkedDiskSize(bytes).roundedUp(to: guestSectorSize),
            protected: backing?.files ?? [])
    }

    private var hasSeveralSizes: Bool {
        options.values.count { $0.key == "size" } > 1
    }

    private func setBacking(
        _ key: String, _ value: [UInt8], _ options: inout CreationOptions
    ) throws(ImageError) {
        guard format == .qcow2 else {
            throw .invalid(
                key == "backing_file"
                    ? "Backing file not supported for file format '\(format.rawValue)'"
                    : "Backing format not supported for file format '\(format.rawValue)'")
        }
        options.set(key, value)
    }

    private func openBacking(
        _ typed: TypedOptions
    ) async throws -> (virtualSize: Int64, files: Set<FileIdentity>)? {
        guard let backing = typed.name("backing_file") else { return nil }
        guard !backing.bytes.isEmpty else {
            throw ImageError.invalid("Expected backing file name, got empty string")
        }
        guard backing != name else {
            throw ImageError.invalid(
                "Error: Trying to create an image with the same filename as the backing file")
        }
        if skipsBackingCheck {
            guard typed.text("backing_fmt") == nil else { return nil }
            throw Self.formatIsMissing(nil)
        }
        let image = try await open(backing, typed.text("backing_fmt"))
        if typed.text("backing_fmt") == nil { throw Self.formatIsMissing(image.format) }
        return (image.source.virtualSize.roundedUp(to: guestSectorSize), Set(image.files))
    }

    private func open(_ backing: ImageName, _ formatName: String?) async throws -> OpenedImage {
        var known: ImageFormat?
        if let formatName {
            guard let format = ImageFormat(rawValue: formatName) else {
                throw ImageError.invalid("Unknown driver '\(formatName)'")
            }
            known = format
        }
        // Only its size and its format are looked at: it may be the disk of a running machine.
        let opener = ImageOpener(shareForced: true, nbd: nbd)
        let found =
            NBDStorage.isName(backing)
            ? backing : try ImageOpener.backingName(backing, namedBy: name)
        do {
            return try await opener.open(found, format: known)
        } catch let error as ImageError {
            let opening = "cannot open: "
            let reason =
                error.message.hasPrefix(opening)
                ? String(error.message.dropFirst(opening.count)) : error.message
            throw ImageError(
                error.kind, "Could not open '\(found)': \(reason). Could not open backing image.")
        }
    }

    private static func formatIsMissing(_ detected: ImageFormat?) -> ImageError {
        .invalid(
            "Backing file specified without backing format"
                + (detected.map { ". Detected format of \($0.rawValue)." } ?? ""))
    }
}

extension ImageCreation.Plan {
    /// Makes the image. A file appears under its name when it is whole, and not at all otherwise.
    ///
    /// - Returns: what could not be done and harms nobody, in words; nil mostly.
    /// - Throws: `ImageError`, or `CancellationError`.
    public func create() async throws -> String? {
        do {
            return try await make()
        } catch let error as ImageError where error.path == nil {
            throw ImageError(error.kind, path: name.description, error.message)
        }
    }

    private func make() async throws -> String? {
        let parameters = try ImageParameters(typed)
        let options = try qcow2Options(parameters)
        if let export = try NBDStorage.open(name, nbd, forWriting: true) {
            try await write(parameters, options, to: export)
            try await export.flush()
            return nil
        }
        let file = try TargetFile.create(
            name.path(), cacheMode: .writeback, protecting: protected)
        do {
            let warning = parameters.attributes.apply(to: file.storage)
            try await write(parameters, options, to: file.storage)
            try await file.commit()
            return warning
        } catch {
            file.abandon()
            throw error
        }
    }

    private func qcow2Options(_ parameters: ImageParameters) throws(ImageError) -> Qcow2Options {
        var options = parameters.qcow2
        let format = parameters.backingFormat
        if let format, ImageFormat(rawValue: format) == nil {
            throw .invalid("Parameter 'backing-fmt' does not accept value '\(format)'")
        }
        if let file = parameters.backingFile {
            options.backing = Qcow2Options.Backing(
                file: file, format: format, virtualSize: size)
        } else if format != nil {
            throw .invalid("Backing format cannot be used without backing file")
        }
        try options.check()
        return options
    }

    private func write(
        _ parameters: ImageParameters, _ options: Qcow2Options, to storage: any Storage
    ) async throws {
        switch typed.format {
        case .raw: try await writeRaw(parameters.preallocation, to: storage)
        case .qcow2:
            let target = try Qcow2Target(
                storage: storage, virtualSize: size, options: options, compress: false,
                minSparse: 4096, writesData: false)
            try await target.prepare()
            try await target.finish()
        }
    }

    /// In bytes.
    private static let firstBlock: Int64 = 4096

    private func writeRaw(_ preallocation: Preallocation, to storage: any Storage) async throws {
        if storage.traits.isDevice || storage.traits.requestsInFlight > 0 {
            guard preallocation == .off else {
                throw ImageError.invalid(
                    "Unsupported preallocation mode '\(preallocation.rawValue)'")
            }
            guard size <= storage.size else {
                throw ImageError.invalid("Cannot grow device files")
            }
            // What stood there is not to be found again by its header.
            return try await storage.zero(
                0..<min(guestSectorSize, storage.size), mayUnmap: false)
        }
        do {
            try await storage.truncate(to: size)
        } catch let error as ImageError where error.kind == .system(errno: EFBIG) {
            throw ImageError.invalid("The image size is too large for file format 'raw'")
        }
        if preallocation.takesBlocks {
            try storage.requireSpace(size)
            try storage.allocate(0..<size, preallocation)
        }
        // The first block is there in any case, as qemu-img has it: who opens the file with O_DIRECT can
        // find out the alignment by reading.
        let written = preallocation == .full ? size : min(Self.firstBlock, size)
        try await storage.writeZeros(0..<written)
    }
}
