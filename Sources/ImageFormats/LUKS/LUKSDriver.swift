import DiskImage
import ImageStorage

/// The driver of LUKS images (version 1): a header, and behind it an encrypted raw disk.
public struct LUKSDriver: FormatDriver {
    public let name = "luks"
    public var creator: (any ImageCreator)? { LUKSCreator() }
    public var resizer: (any ImageResizer)? { LUKSResizer() }
    public var amender: (any ImageAmender)? { LUKSAmender() }

    public init() {}

    public func recognizes(_ start: RawSpan) -> Bool { LUKSHeader.begins(start) }

    public func readOptions(
        from options: inout DescribedOptions, prefix: String, into described: inout DescribedFormat
    ) throws(ImageError) {
        described.encryption.secret = try options.text(prefix + "key-secret")
    }

    public func open(_ storage: any Storage) async throws -> any Image {
        try await LUKSImage(storage, key: ImageKey())
    }

    public func open(
        _ storage: any Storage, snapshot: SnapshotName?, key: ImageKey
    ) async throws -> any Image {
        if let snapshot { return try await open(storage, snapshot: snapshot) }
        return try await LUKSImage(storage, key: key)
    }

    /// Without the passphrase, as in qemu-img.
    public func facts(of storage: any Storage) async throws -> FormatFacts {
        let header = try await LUKSHeader.read(from: storage)
        return FormatFacts(
            virtualSize: try header.payloadSize(in: storage), isDirty: false, isEncrypted: true,
            details: header.details(isPartOfImage: false))
    }
}

extension ImageFormat {
    public static let luks = ImageFormat(LUKSDriver())
}

extension LUKSHeader {
    /// Size of the payload in bytes; a sector in which the storage ends counts whole, as in qemu.
    ///
    /// - Throws: `ImageError` if the storage ends before the payload.
    func payloadSize(in storage: any Storage) throws(ImageError) -> Int64 {
        let size = storage.size.roundedUp(to: guestSectorSize) - payloadOffset
        guard size >= 0 else {
            throw .corrupt(
                storage.name,
                "the encrypted disk at offset \(payloadOffset) lies beyond the end of the file "
                    + "(\(storage.size) bytes)")
        }
        return size
    }
}

/// A LUKS image as a guest disk. All of it is data: zeros, and holes of the file, mean nothing
/// before they are decrypted.
struct LUKSImage: Image {
    let storage: any Storage
    let virtualSize: Int64
    private let payloadOffset: Int64
    private let cipher: DiskCipher

    /// - Throws: `ImageError` for damaged headers and wrong passphrases.
    init(_ storage: any Storage, key: ImageKey) async throws {
        let header = try await LUKSHeader.read(from: storage)
        self.storage = storage
        virtualSize = try header.payloadSize(in: storage)
        payloadOffset = header.payloadOffset
        cipher = try await key.cipher(prefix: "", image: storage.name) {
            try await header.unlock($0, in: storage)
        }
    }

    var readGranularity: Int64 { guestSectorSize }

    /// The plan for writing this image anew.
    var plan: LUKSPlan { .copy(of: storage, length: payloadOffset, cipher) }

    func mappings(at offset: Int64, limit: Int64, holes: HoleSearch) -> [Mapping] {
        [Mapping(offset..<limit, .encrypted, hostOffset: payloadOffset + offset)]
    }

    func readEncrypted(_ mapping: Mapping, into buffer: inout MutableRawSpan) async throws {
        try await storage.readEncrypted(
            into: &buffer, at: payloadOffset + mapping.layerOffset, cipher,
            offset: mapping.layerOffset)
    }
}
