import DiskImage
import ImageStorage

/// What a qcow2 image says of itself, also one that cannot be read: encrypted, with its data in another
/// file, damaged below its header. No table of clusters is looked at.
///
/// Source: QEMU's docs/interop/qcow2.txt.
public struct Qcow2Description: Sendable, Equatable {
    public enum Encryption: Sendable, Equatable {
        case aes
        case luks(LUKSHeader)
    }

    public let header: Qcow2Header
    public let isDirty: Bool
    public let isCorrupt: Bool
    public let hasLazyRefcounts: Bool
    public let encryption: Encryption?
    /// The external data file, as written in the image; nil if none is named.
    public let dataFile: String?
    /// nil where the image holds its data itself.
    public let dataFileIsRaw: Bool?
    public let snapshots: [Qcow2Snapshot]
    public let bitmaps: [Qcow2Bitmap]

    public var refcountBits: Int { header.extras.refcountBits }

    /// - Throws: `ImageError` for anything that is no qcow2 image, or is damaged in what it says.
    public static func read(from storage: any Storage) async throws -> Qcow2Description {
        var fixed = IOBuffer(byteCount: Int(min(storage.size, Int64(Qcow2Header.extendedLength))))
        var bytes = fixed.mutableBytes
        try await storage.read(into: &bytes, at: 0)
        var parser = Qcow2HeaderParser(name: storage.name, isForReading: false)
        let clusterSize = try parser.parseFixedPart(fixed.bytes)

        var cluster = IOBuffer(byteCount: Int(min(storage.size, clusterSize)))
        bytes = cluster.mutableBytes
        try await storage.read(into: &bytes, at: 0)
        let header = try parser.parse(cluster.bytes)
        let places = Places(cluster.bytes, header)
        try places.check(storage.name, header)
        return try await Qcow2Description(header, places, storage)
    }

    private init(_ header: Qcow2Header, _ places: Places, _ storage: any Storage) async throws {
        self.header = header
        typealias Feature = Qcow2Header.IncompatibleFeature
        isDirty = places.incompatible & Feature.dirty != 0
        isCorrupt = places.incompatible & Feature.corrupt != 0
        hasLazyRefcounts = places.compatible & 1 != 0
        dataFile = places.dataFile
        dataFileIsRaw =
            places.incompatible & Feature.externalDataFile == 0
            ? nil : header.extras.autoclearFeatures & 2 != 0
        snapshots = try await Qcow2Snapshot.readAll(
            storage, at: header.extras.snapshotTableOffset, count: Int64(header.extras.snapshots))
        // Without its bit a program that knows no bitmaps has changed the image: they are void.
        if let directory = places.bitmaps, header.extras.autoclearFeatures & 1 != 0 {
            bitmaps = try await Qcow2Bitmap.readAll(
                storage, directory, header.geometry)
        } else {
            bitmaps = []
        }
        switch places.encryptionMethod {
        case 0: encryption = nil
        case 1: encryption = .aes
        case 2:
            guard let place = places.encryptionHeader else {
                throw ImageError.corrupt(
                    storage.name, "the image is encrypted by LUKS and has no LUKS header")
            }
            encryption = .luks(try await LUKSHeader.read(from: storage, at: place))
        default:
            throw ImageError.unsupported(
                storage.name, "encryption method \(places.encryptionMethod) is not supported")
        }
    }

    /// Numbers of the header and its extensions that nobody needs to read the disk.
    private struct Places {
        var incompatible: UInt64 = 0
        var compatible: UInt64 = 0
        var encryptionMethod: UInt32
        var nameOffset: UInt64
        var refcountTableOffset: UInt64
        var refcountTableBytes: Int64
        var clusterSize: Int64
        var dataFile: String?
        var bitmaps: Qcow2BitmapDirectory?
        /// In bytes, from the extension: offset and length.
        var encryptionHeader: (offset: UInt64, length: UInt64)?

        /// - Parameter bytes: the first cluster, which the parser has found good.
        init(_ bytes: RawSpan, _ header: Qcow2Header) {
            encryptionMethod = bytes.bigEndian(at: 32, as: UInt32.self)
            nameOffset = bytes.bigEndian(at: 8, as: UInt64.self)
            refcountTableOffset = bytes.bigEndian(at: 48, as: UInt64.self)
            clusterSize = header.geometry.clusterSize
            refcountTableBytes = header.refcountTableClusters * clusterSize
            var start = Qcow2Header.version2Length
            if header.version >= 3 {
                incompatible = bytes.bigEndian(at: 72, as: UInt64.self)
                compatible = bytes.bigEndian(at: 80, as: UInt64.self)
                start = Int(bytes.bigEndian(at: 100, as: UInt32.self))
            }
            readExtensions(bytes, from: start)
        }

        private mutating func readExtensions(_ bytes: RawSpan, from start: Int) {
            let end =
                nameOffset == 0 ? bytes.byteCount : Int(min(nameOffset, UInt64(bytes.byteCount)))
            var position = start
            while position + 8 <= end {
                let type = bytes.bigEndian(at: position, as: UInt32.self)
                let length = Int(bytes.bigEndian(at: position + 4, as: UInt32.self))
                position += 8
                guard type != Qcow2Header.ExtensionType.end, length <= end - position else {
                    return
                }
                take(type, bytes.extracting(position..<position + length))
                position += length.roundedUp(to: 8)
            }
        }

        private mutating func take(_ type: UInt32, _ content: RawSpan) {
            switch type {
            case Qcow2Header.ExtensionType.dataFile: dataFile = content.text()
            case Qcow2Header.ExtensionType.bitmaps: bitmaps = Qcow2BitmapDirectory(content)
            case Qcow2Header.ExtensionType.encryption where content.byteCount == 16:
                encryptionHeader = (
                    content.bigEndian(at: 0, as: UInt64.self),
                    content.bigEndian(at: 8, as: UInt64.self)
                )
            default: break
            }
        }

        /// Nobody uses the refcount table here, yet an image where it is wrong is none.
        func check(_ name: String, _ header: Qcow2Header) throws(ImageError) {
            if let format = header.backingFormat, format.utf8.count > 15 {
                throw .corrupt(
                    name, "the name of the backing format is too long: \(format.utf8.count) bytes")
            }
            guard nameOffset <= UInt64(clusterSize) else {
                throw .corrupt(name, "the backing file name lies outside the first cluster")
            }
            guard header.extras.snapshotTableOffset % UInt64(clusterSize) == 0 else {
                throw .corrupt(name, "the offset of the snapshot table is invalid")
            }
            guard refcountTableBytes > 0 else {
                throw .corrupt(name, "the image has no refcount table")
            }
            guard refcountTableBytes <= 8 << 20 else {
                throw .corrupt(
                    name, "the refcount table is too large: \(refcountTableBytes) bytes")
            }
            guard let offset = Int64(exactly: refcountTableOffset), offset % clusterSize == 0,
                offset <= Int64.max - refcountTableBytes
            else { throw .corrupt(name, "the offset of the refcount table is invalid") }
        }
    }
}

extension RawSpan {
    /// Text up to the first NUL byte.
    func text() -> String {
        withUnsafeBytes { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
    }
}
