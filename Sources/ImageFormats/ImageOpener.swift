import DiskImage
import ImageStorage
import NBDStorage

/// An image opened to be read, with all that lies below it.
public struct OpenedImage: Sendable {
    public let format: ImageFormat
    /// The guest disk as the guest sees it.
    public let source: any ImageSource
    /// The image without what lies below: its `extent` says `.backing` where it leaves the answer to
    /// that.
    public let topLayer: any ImageSource
    /// What lies below the image, as one guest disk; nil if nothing does.
    public let backing: (any ImageSource)?
    /// The files behind it, the image itself first.
    public let files: [FileIdentity]
    /// How many requests the most distant of its storages wants at once.
    public let requestsInFlight: Int
}

/// Opens images and, through one gate, the files that they name. The one place that knows the kinds of
/// storage.
public struct ImageOpener: Sendable {
    public var cacheMode: CacheMode
    /// Read images that somebody else writes to (`-U`).
    public var shareForced: Bool
    public var nbd: NBDOptions
    /// Asked before a file that an image names is opened; it can refuse by throwing.
    public var backingGate: @Sendable (_ path: String, _ namedBy: String) throws -> Void

    public init(
        cacheMode: CacheMode = .writeback, shareForced: Bool = false,
        nbd: NBDOptions = NBDOptions(),
        backingGate: @escaping @Sendable (_ path: String, _ namedBy: String) throws -> Void = {
            _, _ in
        }
    ) {
        self.cacheMode = cacheMode
        self.shareForced = shareForced
        self.nbd = nbd
        self.backingGate = backingGate
    }

    /// Opens an image and its backing chain.
    ///
    /// - Parameter format: nil looks at the first bytes.
    /// - Throws: `ImageError`; also for a chain that leads back into itself.
    public func open(_ path: String, format: ImageFormat?) async throws -> OpenedImage {
        var layers: [any ImageSource] = []
        var files: [FileIdentity] = []
        var requestsInFlight = 0
        var topFormat = ImageFormat.raw
        var next: (path: String, format: ImageFormat?)? = (path, format)
        var overlay: String?
        while let (path, format) = next {
            let storage = try openStorage(path, namedBy: overlay)
            requestsInFlight = max(requestsInFlight, storage.traits.requestsInFlight)
            if let identity = (storage as? FileStorage)?.identity {
                guard !files.contains(identity) else {
                    throw ImageError.corrupt(path, "the backing chain leads back to this file")
                }
                files.append(identity)
            }
            let known = if let format { format } else { try await ImageFormat.probe(storage) }
            if layers.isEmpty { topFormat = known }
            overlay = path
            next = nil
            switch known {
            case .raw: layers.append(RawSource(storage))
            case .qcow2:
                let image = try await Qcow2Source(storage)
                layers.append(image)
                if let name = image.header.backingFile {
                    next = try backing(
                        name, formatName: image.header.backingFormat, namedBy: path)
                }
            }
        }
        return OpenedImage(
            format: topFormat, source: LayeredSource(layers: layers), topLayer: layers[0],
            backing: layers.count > 1 ? LayeredSource(layers: Array(layers.dropFirst())) : nil,
            files: files, requestsInFlight: requestsInFlight)
    }

    private func openStorage(_ path: String, namedBy overlay: String?) throws -> any Storage {
        do {
            // What an image names is a file: `backingPath` lets nothing else through.
            if overlay == nil, let storage = try NBDStorage.open(path, nbd) { return storage }
            return try FileStorage.openSource(
                path, cacheMode: cacheMode, shareForced: shareForced)
        } catch {
            guard let overlay else { throw error }
            // Nobody typed this name: say where it comes from.
            throw ImageError(
                error.kind, path: path, "\(error.message) (the backing file of \(overlay))")
        }
    }

    private func backing(
        _ name: String, formatName: String?, namedBy overlay: String
    ) throws -> (String, ImageFormat?) {
        let path = try Self.backingPath(name, namedBy: overlay)
        var format: ImageFormat?
        if let formatName, !formatName.isEmpty {
            guard let known = ImageFormat(rawValue: formatName) else {
                throw ImageError.unsupported(
                    overlay, "backing format '\(formatName)' is not supported")
            }
            format = known
        }
        try backingGate(path, overlay)
        return (path, format)
    }

    /// Where a backing file is: relative names count from the folder of the image that names it.
    public static func backingPath(
        _ name: String, namedBy overlay: String
    ) throws(ImageError) -> String {
        var name = name
        if name.hasPrefix("file:") { name.removeFirst("file:".count) }
        // qemu takes what stands before a colon for a protocol, unless a slash comes first.
        if let colon = name.firstIndex(of: ":"), !name[..<colon].contains("/") {
            throw .unsupported(
                overlay, "backing file '\(name)' is not supported: not the path of a file")
        }
        if name.hasPrefix("/") { return name }
        guard !NBDStorage.isName(overlay) else {
            throw .unsupported(
                overlay,
                "backing file '\(name)' is not supported: there is no folder it counts from")
        }
        guard let slash = overlay.lastIndex(of: "/") else { return name }
        return String(overlay[...slash]) + name
    }
}
