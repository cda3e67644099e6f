import Decompression
import DiskImage
import ImageFormats
import ImageStorage

/// An image that is open for reading, with its backing chain.
public struct OpenedImage: Sendable {
    /// The images of the chain, the image itself first; never empty.
    public let layers: [OpenedLayer]

    public var format: ImageFormat { layers[0].format }
    /// The guest disk as the guest sees it.
    public var source: any ImageSource { LayeredSource(layers: layers.map(\.image)) }
    /// The image without its backing chain.
    public var topLayer: any Image { layers[0].image }
    /// The guest disk of the backing file; nil if there is none.
    public var backing: (any ImageSource)? {
        layers.count > 1 ? LayeredSource(layers: layers.dropFirst().map(\.image)) : nil
    }
    /// The mappings of the image alone: `.unallocated` where the backing file decides, `.zero` if
    /// there is none.
    public var ownLayer: any ImageSource {
        LayeredSource(layers: [topLayer], sizeBelow: backing?.virtualSize ?? 0)
    }
    /// The files of the chain, the image's first.
    public var files: [FileIdentity] { layers.compactMap(\.storage.file) }
    /// The largest `StorageTraits.requestsInFlight` in the chain.
    public var requestsInFlight: Int { layers.map(\.storage.traits.requestsInFlight).max() ?? 0 }
    /// The largest `StorageTraits.requestSize` in the chain, in bytes.
    public var requestSize: Int64 { layers.map(\.storage.traits.requestSize).max() ?? 0 }
}

/// One image of a chain.
public struct OpenedLayer: Sendable {
    public let name: ImageName
    public let format: ImageFormat
    public let image: any Image
    /// Whether its description leaves out the backing file.
    let ignoresBacking: Bool

    public var storage: any Storage { image.storage }
}

/// The name and the format of an image that is to be opened.
struct BackingReference: Sendable {
    let name: ImageName
    /// The format; nil to detect it.
    let format: ImageFormat?
}

/// Opens images and, if `backingGate` permits, the files that they name.
public struct ImageOpener: Sendable {
    public var access: StorageAccess
    /// Opens the image as this snapshot recorded it (`-l`); snapshots of its backing files are not
    /// used.
    public var snapshot: SnapshotName?
    /// The manner of reading a source front to back; nil reads it where its bytes are needed.
    public var streaming: SourceStreaming?
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
        try await openChain(from: BackingReference(name: name, format: format))
    }

    /// Opens the backing chain of an image that is open already, as one guest disk.
    ///
    /// - Parameters:
    ///   - name: of the image.
    ///   - storage: holds the image.
    /// - Throws: as `open`.
    public func openBacking(
        _ backing: BackingName, of name: ImageName, in storage: any Storage
    ) async throws -> any ImageSource {
        let layers = try await openChain(
            from: try reference(to: backing, in: name), below: (name, storage.file))
        return LayeredSource(layers: layers.map(\.image))
    }

    /// - Parameter image: the image that names the first one; nil if a person typed the name.
    private func openChain(
        from first: BackingReference, below image: (name: ImageName, file: FileIdentity?)? = nil
    ) async throws -> [OpenedLayer] {
        var layers: [OpenedLayer] = []
        var chain = ChainMembers(files: [image?.file].compactMap { $0 })
        var next: BackingReference? = first
        while let reference = next {
            let layer = try await openLayer(reference, namedBy: layers.last?.name ?? image?.name)
            try chain.add(layer.storage, reference.name)
            layers.append(layer)
            next = try backing(of: layer)
        }
        return layers
    }

    /// Opens an image without its backing chain.
    ///
    /// - Parameter overlay: the image that names this one; nil if a person typed the name.
    /// - Throws: `ImageError`.
    private func openLayer(
        _ reference: BackingReference, namedBy overlay: ImageName?
    ) async throws -> OpenedLayer {
        // For tables and their slices, and for the tasks that read them. No short one is a reason
        // to look at the memory again.
        try MemoryMargin.check()
        let name = reference.name
        let description = try ImageDescription(name)
        let storage: any Storage
        if let streaming, overlay == nil, description == nil {
            storage = try await streaming.open(name) { try openStorage(name) }
        } else {
            storage = try openStorage(name, namedBy: overlay)
        }
        let known = try await knownFormat(reference.format, of: storage, described: description)
        let image = try await known.driver.open(
            storage, snapshot: overlay == nil ? snapshot : nil, key: key(description))
        return OpenedLayer(
            name: (description?.place ?? name).withoutFilePrefix, format: known, image: image,
            ignoresBacking: description?.ignoresBacking ?? false)
    }

    /// The key to an image with this description.
    public func key(_ description: ImageDescription?) -> ImageKey {
        ImageKey(description?.encryption, secrets: access.options.secrets)
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

    /// The backing file that an image names, if the gate permits it; nil if there is none.
    private func backing(of layer: OpenedLayer) throws -> BackingReference? {
        guard !layer.ignoresBacking, let backing = layer.image.backing else { return nil }
        return try reference(to: backing, in: layer.name)
    }

    /// The file or export that a name in an image means, if the gate permits it.
    func reference(
        to named: BackingName, in overlay: ImageName
    ) throws -> BackingReference {
        let backing = try Self.backingName(named.name, namedBy: overlay)
        var format: ImageFormat?
        if let formatName = named.format, !formatName.isEmpty {
            guard let known = ImageFormat.named(formatName) else {
                throw ImageError.unsupported(
                    overlay.description, "backing format '\(formatName)' is not supported")
            }
            format = known
        }
        let place = try Self.blaming(overlay, for: backing) { () throws(ImageError) in
            try ImageDescription(backing)?.place ?? backing
        }
        try backingGate(place, overlay)
        return BackingReference(name: backing, format: format)
    }

    /// Opens the storage that holds an image, and reads nothing.
    ///
    /// - Parameter overlay: the image that names this one; nil if a person typed the name.
    public func openStorage(
        _ name: ImageName, namedBy overlay: ImageName? = nil
    ) throws -> any Storage {
        try Self.blaming(overlay, for: name) { () throws(ImageError) in
            guard let description = try ImageDescription(name) else {
                return try openPlace(name, isTyped: overlay == nil)
            }
            var storage = try openPlace(description.place, isTyped: overlay == nil)
            for part in description.parts {
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
            throw ImageError(
                error.kind, path: name.description,
                "\(error.message) (the backing file of \(overlay))")
        }
    }

    /// - Parameter isTyped: whether a person typed the name. Only such a name may start a server or
    ///   choose keys and certificates; a name in an image means a file or a plain export.
    private func openPlace(_ name: ImageName, isTyped: Bool) throws(ImageError) -> any Storage {
        try Storages.driver(for: name, isTyped: isTyped).openSource(name, access)
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

/// The images of a backing chain so far, to find a loop.
struct ChainMembers {
    var files: [FileIdentity] = []
    /// The names of storages without a `FileIdentity`, or that can be parts of one file: a loop
    /// repeats a name.
    private var names: [ImageName] = []

    init(files: [FileIdentity] = []) { self.files = files }

    /// - Throws: `ImageError` if the chain has this image already.
    mutating func add(_ storage: any Storage, _ name: ImageName) throws(ImageError) {
        if let file = storage.file, !(storage is StoragePart) {
            guard !files.contains(file) else { throw Self.loop(name) }
            files.append(file)
        } else {
            guard !names.contains(name) else { throw Self.loop(name) }
            names.append(name)
        }
    }

    private static func loop(_ name: ImageName) -> ImageError {
        .corrupt(name.description, "the backing chain leads back to this file")
    }
}
