import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// One `swimg create`: makes an empty image or an overlay of a backing file.
///
/// `prepare` validates the request; `Plan.create` makes the image.
public struct ImageCreation: Sendable {
    /// A path, or a name that a driver of `Storages` claims.
    public var name: ImageName
    public var format: ImageFormat
    public var options = CreationOptions()
    /// Size of the guest disk in bytes; nil takes it from the options or the backing file.
    public var size: Int64?
    /// The backing file (`-b`); `backingFormat` is its format (`-F`).
    public var backingFile: ImageName?
    public var backingFormat: String?
    /// Does not open the backing file (`-u`).
    public var skipsBackingCheck = false
    public var storageOptions = StorageOptions()

    public init(_ name: ImageName, format: ImageFormat) {
        self.name = name
        self.format = format
    }

    /// A validated request.
    public struct Plan: Sendable {
        /// The line that qemu-img prints, with all options and without a line break.
        public let line: String
        fileprivate let name: ImageName
        fileprivate let access: StorageAccess
        fileprivate let format: ImageFormat
        fileprivate let typed: TypedOptions
        /// In bytes, a multiple of 512.
        fileprivate let size: Int64
        fileprivate let protected: Set<FileIdentity>
    }

    /// Reads the options and, for its size, the backing file.
    ///
    /// - Throws: `ImageError`, in qemu-img's words if callers may search for them.
    public func prepare() async throws -> Plan {
        do {
            return try await plan()
        } catch let error as ImageError where error.path == nil {
            throw error.about(name.description)
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
        // A name that cannot be created must fail before anything is printed.
        try Storages.driver(for: name).check(name)
        let backing = try await openBacking(typed)
        guard let bytes = size ?? typed.number("size") ?? backing?.virtualSize else {
            throw ImageError.invalid("Image creation needs a size parameter")
        }
        let size = try bytes.checkedAsDiskSize().roundedUp(to: guestSectorSize)
        return Plan(
            line: typed.creationLine(name, size: bytes), name: name,
            access: StorageAccess(options: storageOptions), format: format,
            typed: typed, size: size,
            protected: backing?.files ?? [])
    }

    private var hasSeveralSizes: Bool {
        options.values.count { $0.key == "size" } > 1
    }

    private func setBacking(
        _ key: String, _ value: [UInt8], _ options: inout CreationOptions
    ) throws(ImageError) {
        guard format.driver.canHaveBacking else {
            throw .invalid(
                key == "backing_file"
                    ? "Backing file not supported for file format '\(format)'"
                    : "Backing format not supported for file format '\(format)'")
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
            guard let format = ImageFormat.ofBacking(formatName) else {
                throw ImageError.invalid("Unknown driver '\(formatName)'").asQemu(
                    "Unknown driver '\(formatName)'", hint: "Could not open backing image.")
            }
            known = format
        }
        // Shared access suffices to read the size and the format; a running machine may be using
        // the file.
        var opener = ImageOpener(
            StorageAccess(shareForced: true, options: storageOptions))
        opener.needsSecrets = false
        let found = try ImageOpener.backingName(backing, namedBy: name, isTyped: true)
        do {
            return try await opener.open(found, format: known)
        } catch let error as ImageError {
            let opening = "cannot open: "
            let reason =
                error.message.hasPrefix(opening)
                ? String(error.message.dropFirst(opening.count)) : error.message
            throw ImageError(
                error.kind, "Could not open '\(found)': \(reason). Could not open backing image."
            ).asQemu(error.qemuMessage, hint: "Could not open backing image.")
        }
    }

    private static func formatIsMissing(_ detected: ImageFormat?) -> ImageError {
        let words = "Backing file specified without backing format"
        let remark = detected.map { "Detected format of \($0)." }
        return .invalid(words + (remark.map { ". \($0)" } ?? "")).asQemu(words, hint: remark)
    }
}

extension ImageCreation.Plan {
    /// Makes the image. If that fails, no file appears under its name.
    ///
    /// - Returns: a warning about something harmless that could not be done; usually nil.
    /// - Throws: `ImageError`, or `CancellationError`.
    public func create() async throws -> String? {
        do {
            return try await make()
        } catch let error as ImageError where error.path == nil {
            throw error.about(name.description)
        }
    }

    private func make() async throws -> String? {
        let image = try newImage()
        let files = try TargetFiles(
            beginning: name, image.parameters,
            TargetRequest(.create, access: access, sourceFiles: protected))
        do {
            var image = image
            let warning = files.storage.apply(image.parameters.attributes)
            if let data = files.dataStorage {
                _ = data.apply(image.parameters.attributes)
                image.setData(data)
            }
            try await image.makeEmpty(on: files.storage, size: size)
            try await files.commit()
            return warning
        } catch {
            files.abandon()
            throw error
        }
    }

    private func newImage() throws(ImageError) -> any NewImage {
        var image = try format.creator().newImage(typed)
        let backingFormat = image.parameters.backingFormat
        if let backingFormat, ImageFormat.ofBacking(backingFormat) == nil {
            throw .invalid("Parameter 'backing-fmt' does not accept value '\(backingFormat)'")
        }
        if let file = image.parameters.backingFile {
            image.setBacking(BackingName(file, format: backingFormat), virtualSize: size)
        } else if backingFormat != nil {
            throw .invalid("Backing format cannot be used without backing file")
        }
        try image.check()
        return image
    }
}
