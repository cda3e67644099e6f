import Decompression
import DiskImage
import ImageFormats
import ImageStorage

/// An image that is to be opened.
struct ImageReference: Sendable {
    let name: ImageName
    /// The format; nil to detect it.
    let format: ImageFormat?
    /// The image that names this one; nil if a person did.
    var overlay: ImageName?
    /// The part of the overlay's description that describes this image; nil if only its name tells.
    var part: ImageDescription?

    /// The description of the image; nil if its name is a plain one.
    func description() throws(ImageError) -> ImageDescription? {
        if let part { return part }
        return try ImageDescription(name)
    }
}

/// Opens images and, if `backingGate` permits, the files that they name.
public struct ImageOpener: Sendable {
    public var access: StorageAccess
    /// Opens the image as this snapshot recorded it (`-l`); snapshots of its backing files are not
    /// used.
    public var snapshot: SnapshotName?
    /// The manner of reading a source front to back; nil reads it where its bytes are needed.
    public var streaming: SourceStreaming?
    /// Reads on behind what cannot be read (`PatientStorage`).
    public var isPatient = false
    /// Whether encrypted images must be opened with their secrets. Otherwise an image whose secret
    /// is not named gives everything but its data.
    public var needsSecrets = true
    /// Runs before a file or an export that an image names is opened, and throws to refuse it. The
    /// name is a path or the name of an export, even if the image has a description (`json:{…}`).
    public var backingGate: @Sendable (_ name: ImageName, _ namedBy: ImageName) throws -> Void

    public init(
        _ access: StorageAccess = StorageAccess(),
        backingGate: @escaping @Sendable (_ name: ImageName, _ namedBy: ImageName) throws -> Void =
            { _, _ in }
    ) {
        self.access = access
        self.backingGate = backingGate
    }

    /// Opens an image and its backing chain.
    ///
    /// - Parameter format: nil detects it.
    /// - Throws: `ImageError`; also for a backing chain with a loop.
    public func open(_ name: ImageName, format: ImageFormat?) async throws -> OpenedImage {
        OpenedImage(layers: try await openChain(name, format: format))
    }

    /// Opens an image and its backing chain as single images, the image itself first.
    public func openChain(_ name: ImageName, format: ImageFormat?) async throws -> [OpenedLayer] {
        try await openChain(from: ImageReference(name: name, format: format))
    }

    /// Opens a backing chain as single images; never empty.
    ///
    /// - Parameters:
    ///   - name: of the image that is to have the backing file.
    ///   - storage: holds that image.
    /// - Throws: as `open`.
    public func openBackingChain(
        _ backing: BackingName, of name: ImageName, in storage: any Storage
    ) async throws -> [OpenedLayer] {
        try await openChain(
            from: try reference(to: backing, in: name), below: (name, storage.file))
    }

    /// Opens the backing chain of an image that is open already, as single images: as its
    /// description has it, or else as the image names it; empty if there is none.
    ///
    /// - Parameters:
    ///   - named: what the image names.
    ///   - name: of the image, as a person gave it.
    ///   - storage: holds the image.
    /// - Throws: as `open`.
    public func openChain(
        below named: BackingName?, of name: ImageName, in storage: any Storage
    ) async throws -> [OpenedLayer] {
        let image = ImageReference(name: name, format: nil)
        let place = try image.description().place(or: name).withoutFilePrefix
        guard let first = try backing(named, of: place, image) else { return [] }
        return try await openChain(from: first, below: (name, storage.file))
    }

    /// - Parameter image: the image that names the first one; nil if a person typed the name.
    private func openChain(
        from first: ImageReference, below image: (name: ImageName, file: FileIdentity?)? = nil
    ) async throws -> [OpenedLayer] {
        var layers: [OpenedLayer] = []
        var chain = ChainMembers(files: [image?.file].compactMap { $0 })
        var next: ImageReference? = first
        do {
            while let reference = next {
                let layer = try await openLayer(reference)
                try chain.add(layer.storage, reference)
                layers.append(layer)
                next = try backing(layer.image.backing, of: layer.name, reference)
            }
        } catch let error as ImageError {
            throw error.opening(
                ImageDescription.shown(image?.name ?? first.name),
                depth: layers.count + (image == nil ? 0 : 1))
        }
        return layers
    }

    /// Opens an image without its backing chain.
    ///
    /// - Throws: `ImageError`.
    private func openLayer(_ reference: ImageReference) async throws -> OpenedLayer {
        // For tables and their slices, and for the tasks that read them. No short one is a reason
        // to look at the memory again.
        try MemoryMargin.check()
        let name = reference.name
        let description = try reference.description()
        let storage: any Storage
        let isFirst = reference.overlay == nil && reference.part == nil
        if let streaming, isFirst, description == nil {
            storage = try await streaming.open(name) { try openPlace(name, isTyped: true) }
        } else {
            storage = try await openStorage(reference)
        }
        let known = try await knownFormat(reference.format, of: storage, described: description)
        guard description?.backing == nil || known.driver.canHaveBacking else {
            throw ImageError(
                .invalid, path: ImageDescription.shown(name),
                "Driver doesn't support backing files")
        }
        let image = try await known.driver.open(
            storage, snapshot: isFirst ? snapshot : nil, key: key(description))
        let place = description.place(or: name).withoutFilePrefix
        let data = try openData(
            of: image, at: place, described: description?.dataFile,
            isTyped: reference.overlay == nil)
        return OpenedLayer(
            name: place, format: known,
            image: data.map { image.reading(dataFrom: $0.storage) } ?? image,
            description: description, dataName: data?.name)
    }

    /// The key to an image with this description.
    public func key(_ description: ImageDescription?) -> ImageKey {
        ImageKey(
            description?.encryption, secrets: access.options.secrets, isOptional: !needsSecrets)
    }

    /// Decides on a format: the one asked for, the one described or, without either, the detected
    /// one.
    ///
    /// - Throws: `ImageError`; also if the first two differ.
    public func knownFormat(
        _ asked: ImageFormat?, of storage: any Storage, described description: ImageDescription?
    ) async throws -> ImageFormat {
        if let asked, let described = description?.format, described != asked {
            throw ImageError.invalid(
                "format '\(asked)' was asked for, and '\(described)' is described"
            )
        }
        if let format = asked ?? description?.format { return format }
        return try await ImageFormat.probe(storage)
    }

    /// The backing file of an image, if the gate permits it: as its description has it, or else as
    /// the image names it; nil if there is none.
    ///
    /// - Parameter named: what the image names.
    func backing(
        _ named: BackingName?, of image: ImageName, _ reference: ImageReference
    ) throws -> ImageReference? {
        let description = try reference.description()
        if description?.ignoresBacking ?? false { return nil }
        guard let described = description?.backing else {
            return try named.map { try self.reference(to: $0, in: image) }
        }
        let usual = named?.format.flatMap { $0.isEmpty ? nil : $0 }
        guard described.place.bytes.isEmpty else {
            if let overlay = reference.overlay { try backingGate(described.place, overlay) }
            return ImageReference(
                name: described.place,
                format: try described.format ?? usual.map { try backingFormat($0, of: image) },
                overlay: reference.overlay, part: described)
        }
        guard var named else {
            throw ImageError(.invalid, path: image.description, "has no backing file")
        }
        if described.format != nil { named.format = nil }
        let found = try self.reference(to: named, in: image)
        return ImageReference(
            name: found.name, format: described.format ?? found.format, overlay: found.overlay,
            part: described)
    }

    /// The file or export that a name in an image means, if the gate permits it.
    func reference(
        to named: BackingName, in overlay: ImageName
    ) throws -> ImageReference {
        let backing = try Self.backingName(named.name, namedBy: overlay)
        var format: ImageFormat?
        if let formatName = named.format, !formatName.isEmpty {
            format = try backingFormat(formatName, of: overlay)
        }
        let place = try Self.blaming(overlay, for: backing) { () throws(ImageError) in
            try ImageDescription(backing)?.place ?? backing
        }
        try backingGate(place, overlay)
        return ImageReference(name: backing, format: format, overlay: overlay)
    }

    private func backingFormat(
        _ name: String, of overlay: ImageName
    ) throws(ImageError) -> ImageFormat {
        guard let known = ImageFormat.ofBacking(name) else {
            throw ImageError.unsupported(
                overlay.description, "backing format '\(name)' is not supported"
            ).asQemu("Unknown driver '\(name)'")
        }
        return known
    }

    /// Opens the storage that holds an image, and reads nothing. A person typed the name.
    public func openStorage(_ name: ImageName) async throws -> any Storage {
        try await openStorage(ImageReference(name: name, format: nil))
    }

    /// Opens the storage that holds an image of a chain.
    ///
    /// - Parameter overlay: the image that names this one.
    public func openStorage(
        _ name: ImageName, namedBy overlay: ImageName
    ) async throws -> any Storage {
        try await openStorage(ImageReference(name: name, format: nil, overlay: overlay))
    }

    func openStorage(_ reference: ImageReference) async throws -> any Storage {
        let overlay = reference.overlay
        let description = try Self.blaming(overlay, for: reference.name) {
            () throws(ImageError) in try reference.description()
        }
        var disk: DiskStorage?
        if let inner = description?.inner {
            let name = ImageReference(
                name: inner.place, format: inner.format, overlay: overlay, part: inner)
            disk = DiskStorage(OpenedImage(layers: try await openChain(from: name)))
        }
        return try Self.blaming(overlay, for: reference.name) { () throws(ImageError) in
            let place = description.place(or: reference.name)
            var storage: any Storage =
                if let disk { disk } else { try openPlace(place, isTyped: overlay == nil) }
            for part in description?.parts ?? [] {
                storage = try StoragePart(of: storage, offset: part.offset, size: part.size)
            }
            return storage
        }
    }

    /// Adds to an error the image that a name comes from, unless a person typed the name.
    private static func blaming<Result>(
        _ overlay: ImageName?, for name: ImageName,
        _ body: () throws(ImageError) -> Result
    ) throws(ImageError) -> Result {
        do {
            return try body()
        } catch {
            guard let overlay else { throw error }
            throw error.noting("the backing file of \(overlay)").about(name.description)
        }
    }

    /// - Parameter isTyped: whether a person typed the name. Only such a name may start a server or
    ///   choose keys and certificates; a name in an image means a file or a plain export.
    func openPlace(_ name: ImageName, isTyped: Bool) throws(ImageError) -> any Storage {
        let storage = try Storages.driver(for: name, isTyped: isTyped).openSource(name, access)
        // Files never fail to tell their holes.
        return isPatient && storage.traits.isRemote ? PatientStorage(storage) : storage
    }

    /// The name by which this process opens a backing file: relative paths, with `file:` or
    /// without, count from the folder of the image that names it. Exports and descriptions
    /// (`json:{…}`) stay unchanged, so the paths in them count from the working directory, as in
    /// qemu.
    ///
    /// - Throws: `ImageError` for an unknown protocol, for an export behind TLS (only a person may
    ///   choose keys and certificates), and for a relative path in an image that is in no folder.
    public static func backingName(
        _ name: ImageName, namedBy overlay: ImageName, isTyped: Bool = false
    ) throws(ImageError) -> ImageName {
        if !Storages.isPath(name, isTyped: isTyped) || ImageDescription.isJSON(name) { return name }
        guard let path = try? name.path() else {
            throw .unsupported(
                overlay.description,
                "backing file '\(name)' is not supported: not the path of a file")
        }
        if path.isAbsolute { return path.name }
        guard let found = Storages.driver(for: overlay).name(of: path, in: overlay) else {
            throw .unsupported(
                overlay.description,
                "backing file '\(name)' is not supported: there is no folder it counts from")
        }
        return found
    }
}

extension ImageDescription? {
    /// The place of an image: described, or else its name.
    func place(or name: ImageName) -> ImageName {
        guard let place = self?.place, !place.bytes.isEmpty else { return name }
        return place
    }
}

extension ImageName {
    /// Marks what `body` throws as the reason why the image with this name cannot be opened.
    public func opening<Result>(
        _ body: () async throws -> Result
    ) async throws -> Result {
        do {
            return try await body()
        } catch let error as ImageError {
            throw error.opening(ImageDescription.shown(self))
        }
    }
}

/// The images of a backing chain so far, to find a loop.
struct ChainMembers {
    var files: [FileIdentity] = []
    /// The names of storages without a `FileIdentity`, or that can be parts of one file: a loop
    /// repeats a name.
    private var names: [ImageName] = []

    init(files: [FileIdentity] = []) { self.files = files }

    /// - Throws: `ImageError` if the chain has this image already.
    mutating func add(_ storage: any Storage, _ reference: ImageReference) throws(ImageError) {
        var name = reference.name
        for part in reference.part?.parts ?? [] {
            name = ImageName("\(name) from \(part.offset) on")
        }
        if let file = storage.file, !(storage is StoragePart), !(storage is DiskStorage) {
            guard !files.contains(file) else { throw Self.loop(name) }
            files.append(file)
        } else {
            guard !names.contains(name) else { throw Self.loop(name) }
            names.append(name)
        }
    }

    private static func loop(_ name: ImageName) -> ImageError {
        .corrupt(name.description, "the backing chain leads back to this file").asQemu(
            "Backing file '\(name)' creates an infinite loop.", standsAlone: true)
    }
}
