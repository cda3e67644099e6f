import DiskImage
import ImageStorage

/// The driver of qcow2 images, versions 2 and 3.
public struct Qcow2Driver: FormatDriver {
    public let name = "qcow2"
    public let canHaveBacking = true
    public var creator: (any ImageCreator)? { Qcow2Creator() }
    public var checker: (any ImageChecker)? { Qcow2ImageChecker() }
    public var resizer: (any ImageResizer)? { Qcow2ImageResizer() }
    public var snapshotEditor: (any SnapshotEditor)? { Qcow2ImageSnapshots() }
    public var bitmapEditor: (any BitmapEditor)? { Qcow2ImageBitmaps() }
    public var overlayEditor: (any OverlayEditor)? { Qcow2OverlayEditor() }
    public var amender: (any ImageAmender)? { Qcow2ImageAmender() }

    public init() {}

    public func recognizes(_ start: RawSpan) -> Bool {
        start.byteCount >= 8
            && start.bigEndian(at: 0, as: UInt32.self) == Qcow2Header.magic
            && start.bigEndian(at: 4, as: UInt32.self) >= 2
    }

    public func readOptions(
        from options: inout DescribedOptions, prefix: String, into described: inout DescribedFormat
    ) throws(ImageError) {
        let encryption = prefix + Qcow2Encryption.prefix
        described.encryption.format = try options.text(encryption + "format")
        described.encryption.secret = try options.text(encryption + "key-secret")
    }

    public func open(_ storage: any Storage) async throws -> any Image {
        try await Qcow2Source(storage)
    }

    public func open(_ storage: any Storage, snapshot: SnapshotName) async throws -> any Image {
        try await Qcow2Source(storage, snapshot: snapshot)
    }

    public func open(
        _ storage: any Storage, snapshot: SnapshotName?, key: ImageKey
    ) async throws -> any Image {
        guard let snapshot else { return try await Qcow2Source(storage, key: key) }
        return try await Qcow2Source(storage, snapshot: snapshot, key: key)
    }

    public func facts(of storage: any Storage) async throws -> FormatFacts {
        try await Qcow2Description(storage).facts
    }
}

extension ImageFormat {
    public static let qcow2 = ImageFormat(Qcow2Driver())
}

struct Qcow2ImageResizer: ImageResizer {
    func resize(
        _ storage: any WritableStorage, key: ImageKey, preallocation: Preallocation,
        openBacking: (BackingName) async throws -> any ImageSource,
        openData: (any Image) throws -> (any WritableStorage)?,
        newSize: (_ current: Int64) throws -> Int64
    ) async throws {
        do {
            let image = try await Qcow2Source(storage, key: key)
            var backing: (any ImageSource)?
            if let name = image.backing { backing = try await openBacking(name) }
            let data = try openData(image)
            let size = try newSize(image.virtualSize)
            var resizer = try await Qcow2Resizer(
                storage: storage, header: image.header, backing: backing, data: data,
                encryption: image.encryption)
            try await resizer.resizeWithBitmaps(to: size, preallocation: preallocation)
        } catch let error as ImageError {
            throw error.naming(storage.name)
        }
    }
}

extension ImageError {
    /// Adds the image to an error about its backing file, whose name the image itself contains.
    fileprivate func naming(_ image: String) -> ImageError {
        guard let path, path != image, !message.contains("(the backing file of ") else {
            return self
        }
        return noting("below \(image)")
    }
}
