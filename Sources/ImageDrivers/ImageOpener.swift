import DiskImage
import ImageFormats
import ImageStorage

/// An image opened to be read, with all that lies below it.
public struct OpenedImage: Sendable {
    public let format: ImageFormat
    /// The guest disk as the guest sees it.
    public let source: any ImageSource
    /// The image without what lies below.
    public let topLayer: any Image
    /// What lies below the image, as one guest disk; nil if nothing does.
    public let backing: (any ImageSource)?
    /// The image without what lies below, good for its mappings only: `.unallocated` is what the
    /// disk below decides. What an image without one does not allocate is `.zero`.
    public var ownLayer: any ImageSource {
        LayeredSource(layers: [topLayer], sizeBelow: backing?.virtualSize ?? 0)
    }
    /// The files behind it, the image itself first.
    public let files: [FileIdentity]
    /// The image and all that lies below it, one by one.
    public let layers: [OpenedLayer]
    /// How many requests the most distant of its storages wants at once.
    public let requestsInFlight: Int
    /// And how long they should be, in bytes.
    public let requestSize: Int64
}

/// One image of a chain.
public struct OpenedLayer: Sendable {
    public let name: ImageName
    public let format: ImageFormat
    public let image: any Image
    /// It was opened to be used without its backing file.
    let ignoresBacking: Bool

    public var storage: any Storage { image.storage }
}

/// A file that an image names.
public struct BackingReference: Sendable {
    public let name: ImageName
    /// nil has to be found out.
    public let format: ImageFormat?
}

/// Opens images and, through one gate, the files that they name.
public struct ImageOpener: Sendable {
    public var access: StorageAccess
    /// Open the image that a person named as it was then (`-l`); what it lies on is today's.
    public var snapshot: SnapshotName?
    /// Asked before what an image names is opened, with the path of a file or the name of an NBD
    /// export, also where the image describes it (`json:{…}`); it can refuse by throwing.
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
    /// - Parameter format: nil looks at the first bytes.
    /// - Throws: `ImageError`; also for a chain that leads back into itself.
    public func open(_ name: ImageName, format: ImageFormat?) async throws -> OpenedImage {
        let layers = try await openChain(name, format: format)
        let images = layers.map(\.image)
        return OpenedImage(
            format: layers[0].format, source: LayeredSource(layers: images),
            topLayer: images[0],
            backing: layers.count > 1 ? LayeredSource(layers: Array(images.dropFirst())) : nil,
            files: layers.compactMap(\.storage.file), layers: layers,
            requestsInFlight: layers.map(\.storage.traits.requestsInFlight).max() ?? 0,
            requestSize: layers.map(\.storage.traits.requestSize).max() ?? 0)
    }

    /// Opens an image and its backing chain as single images, from the image itself down; never
    /// empty.
    public func openChain(
        _ name: ImageName, format: ImageFormat?
    ) async throws -> [OpenedLayer] {
        try await openChain(from: BackingReference(name: name, format: format))
    }

    /// Opens what lies below an image that is open already, as one guest disk.
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

    /// - Parameter image: names the first of them; nil if a person typed the name.
    private func openChain(
        from first: BackingReference, below image: (name: ImageName, file: FileIdentity?)? = nil
    ) async throws -> [OpenedLayer] {
        var layers: [OpenedLayer] = []
        var chain = ChainMembers(files: [image?.file].compactMap { $0 })
        var next: BackingReference? = first
        while let reference = next {
            let layer = try await openLayer(
                reference.name, format: reference.format, namedBy: layers.last?.name ?? image?.name)
            try chain.add(layer.storage, reference.name)
            layers.append(layer)
            next = try backing(of: layer)
        }
        return layers
    }

    /// Opens an image alone, without what it lies on.
    ///
    /// - Parameters:
    ///   - format: nil looks at the first bytes.
    ///   - overlay: the image that names it; nil for a name that a person typed.
    /// - Throws: `ImageError`.
    public func openLayer(
        _ name: ImageName, format: ImageFormat?, namedBy overlay: ImageName? = nil
    ) async throws -> OpenedLayer {
        let storage = try openStorage(name, namedBy: overlay)
        let description = try ImageDescription(name)
        let known = try await knownFormat(format, of: storage, described: description)
        let image: any Image
        if overlay == nil, let snapshot {
            image = try await known.driver.open(storage, snapshot: snapshot)
        } else {
            image = try await known.driver.open(storage)
        }
        return OpenedLayer(
            name: (description?.place ?? name).withoutFilePrefix, format: known, image: image,
            ignoresBacking: description?.ignoresBacking ?? false)
    }

    /// The format that was asked for, or is described, or else is found out.
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

    /// What an image names as its backing file, after the gate has let it through; nil if nothing.
    public func backing(of layer: OpenedLayer) throws -> BackingReference? {
        guard !layer.ignoresBacking, let backing = layer.image.backing else { return nil }
        return try reference(to: backing, in: layer.name)
    }

    /// The file that a name in an image leads to, after the gate has let the name through.
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

    /// Opens what holds an image, without looking into it.
    ///
    /// - Parameter overlay: the image that names it; nil for a name, or a description, that a
    ///   person typed.
    public func openStorage(
        _ name: ImageName, namedBy overlay: ImageName? = nil
    ) throws -> any Storage {
        try Self.blaming(overlay, for: name) { () throws(ImageError) in
            guard let description = try ImageDescription(name) else {
                return try openPlace(name, isTyped: overlay == nil)
            }
            var storage = try openPlace(description.place, isTyped: overlay == nil)
            for window in description.windows {
                storage = try StorageWindow(of: storage, offset: window.offset, size: window.size)
            }
            return storage
        }
    }

    /// Adds to an error which image a name comes from, unless a person typed the name.
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

    /// - Parameter isTyped: by a person, who may have a server started and may say which keys and
    ///   certificates are used. What stands in an image is a file or a plain export.
    private func openPlace(_ name: ImageName, isTyped: Bool) throws(ImageError) -> any Storage {
        try Storages.driver(for: name, isTyped: isTyped).openSource(name, access)
    }

    /// The name of a backing file from here: relative paths count from the folder of the image that
    /// names it, also behind `file:`. Exports and descriptions (`json:{…}`) stay as they are, so
    /// the paths in them count from the working directory, as in qemu.
    ///
    /// - Throws: `ImageError` for a name of a protocol that there is not, for an export behind TLS
    ///   (which keys and certificates are used is for a person to say), and for a relative path in
    ///   an image that is in no folder.
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

/// Finds a chain that leads back into itself.
struct ChainMembers {
    var files: [FileIdentity] = []
    /// Where no file says who it is, or several images may be in one: any loop comes to the same
    /// name again.
    private var names: [ImageName] = []

    init(files: [FileIdentity] = []) { self.files = files }

    /// - Throws: `ImageError` if it is there already.
    mutating func add(_ storage: any Storage, _ name: ImageName) throws(ImageError) {
        if let file = storage.file, !(storage is StorageWindow) {
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
