import DiskImage
import ImageStorage

/// What a check has to know of a header. A check takes in images that no guest disk can be read from here:
/// encrypted ones, with external data files, with tables in any state.
///
/// Source: QEMU's docs/interop/qcow2.txt, sections "Header" and "Header extensions".
struct Qcow2CheckHeader: Sendable, Equatable {
    var geometry: Qcow2Geometry
    var version: Int
    var refcountBits: Int
    var l1Offset: Int64
    var l1Entries: Int64
    var refcountTableOffset: Int64
    var refcountTableClusters: Int64
    var snapshotCount: UInt32
    var snapshotTableOffset: UInt64
    var incompatibleFeatures: UInt64
    var autoclearFeatures: UInt64
    var encryptionHeader: Qcow2Header.TableRange?
    var bitmaps: Bitmaps?

    struct Bitmaps: Sendable, Equatable {
        var count: Int
        var directory: Qcow2Header.TableRange
    }

    var hasDataFile: Bool {
        incompatibleFeatures & Qcow2Header.IncompatibleFeature.externalDataFile != 0
    }

    private static let maximumBitmaps = 65535
    private static let luks: UInt32 = 2
    /// 1024 bytes for each bitmap, as qemu has it.
    private static let maximumBitmapDirectory = UInt64(1024 * maximumBitmaps)

    /// Reads a header.
    ///
    /// - Throws: `ImageError` for what is no qcow2 image, and where not even the tables can be found.
    static func read(from storage: any Storage) async throws -> Qcow2CheckHeader {
        var parser = Qcow2HeaderParser(name: storage.name, purpose: .describing)
        let cluster = try await parser.readFirstCluster(of: storage)
        return try Qcow2CheckHeader(cluster.bytes, name: storage.name)
    }

    /// - Parameter bytes: the first cluster, whose fixed part `Qcow2HeaderParser` has looked at.
    private init(_ bytes: RawSpan, name: String) throws(ImageError) {
        let clusterBits = Int(bytes.bigEndian(at: 20, as: UInt32.self))
        version = Int(bytes.bigEndian(at: 4, as: UInt32.self))
        var order: UInt32 = 4
        var headerLength = Qcow2Header.version2Length
        incompatibleFeatures = 0
        autoclearFeatures = 0
        if version >= 3 {
            incompatibleFeatures = bytes.bigEndian(at: 72, as: UInt64.self)
            autoclearFeatures = bytes.bigEndian(at: 88, as: UInt64.self)
            order = bytes.bigEndian(at: 96, as: UInt32.self)
            headerLength = Int(bytes.bigEndian(at: 100, as: UInt32.self))
        }
        guard headerLength <= bytes.byteCount else {
            throw .corrupt(name, "the header is cut short")
        }
        let unknown = incompatibleFeatures & ~Qcow2Header.IncompatibleFeature.known
        guard unknown == 0 else {
            let bits = (0..<64).filter { unknown & (1 << UInt64($0)) != 0 }
            throw .unsupported(
                name,
                "unsupported qcow2 feature(s): "
                    + bits.map { "bit \($0)" }.joined(separator: ", "))
        }
        guard order <= 6 else {
            throw .corrupt(name, "refcounts of 2^\(order) bits are not allowed")
        }
        refcountBits = 1 << Int(order)
        guard let virtualSize = Int64(exactly: bytes.bigEndian(at: 24, as: UInt64.self)),
            virtualSize <= largestDiskSize
        else { throw .tooLarge("the virtual size", path: name) }
        geometry = Qcow2Geometry(
            clusterBits: clusterBits,
            hasExtendedL2: incompatibleFeatures & Qcow2Header.IncompatibleFeature.extendedL2 != 0,
            virtualSize: virtualSize)
        guard
            !geometry.hasExtendedL2 || geometry.clusterSize >= Qcow2Geometry.smallestExtendedCluster
        else {
            throw .corrupt(name, "extended L2 entries need clusters of 16 KiB or more")
        }
        l1Entries = Int64(bytes.bigEndian(at: 36, as: UInt32.self))
        guard l1Entries <= Qcow2Header.maximumL1Entries else {
            throw .corrupt(name, "the L1 table is too large: \(l1Entries) entries")
        }
        guard l1Entries >= geometry.l1Entries else {
            throw .corrupt(
                name,
                "the L1 table is too small: \(l1Entries) entries, the virtual size needs "
                    + "\(geometry.l1Entries)")
        }
        l1Offset = try Self.tableOffset(bytes, at: 40, geometry, name, "L1 table")
        refcountTableOffset = try Self.tableOffset(bytes, at: 48, geometry, name, "refcount table")
        refcountTableClusters = Int64(bytes.bigEndian(at: 56, as: UInt32.self))
        guard refcountTableClusters <= Qcow2Layout.maximumRefcountTable / geometry.clusterSize
        else {
            throw .corrupt(
                name, "the refcount table is too large: \(refcountTableClusters) clusters")
        }
        snapshotCount = bytes.bigEndian(at: 60, as: UInt32.self)
        snapshotTableOffset = bytes.bigEndian(at: 64, as: UInt64.self)
        try Self.checkBackingName(bytes, name)
        try parseExtensions(bytes, from: headerLength, name)
        try checkCoding(bytes, headerLength, name)
    }

    /// What decides how clusters are to be read: a header that contradicts itself there is damaged.
    private func checkCoding(
        _ bytes: RawSpan, _ headerLength: Int, _ name: String
    ) throws(ImageError) {
        let number =
            version >= 3 && headerLength > Qcow2Header.version3Length
            ? bytes.unsafeLoad(fromByteOffset: Qcow2Header.version3Length, as: UInt8.self) : 0
        guard let compression = Qcow2Compression(headerNumber: number) else {
            throw .unsupported(name, "compression type \(number) is not supported")
        }
        let isFlagged =
            incompatibleFeatures & Qcow2Header.IncompatibleFeature.compressionType != 0
        guard isFlagged == (compression != .zlib) else {
            throw .corrupt(
                name,
                "the compression type (\(compression)) contradicts the incompatible feature bits")
        }
        let encryption = bytes.bigEndian(at: 32, as: UInt32.self)
        guard encryption <= Self.luks else {
            throw .unsupported(name, "encryption method \(encryption) is not supported")
        }
        guard encryption != Self.luks || encryptionHeader != nil else {
            throw .corrupt(name, "the extension that names the encryption header is missing")
        }
    }

    /// The file behind the name does not matter to a check; that it has a place does.
    private static func checkBackingName(_ bytes: RawSpan, _ name: String) throws(ImageError) {
        let offset = bytes.bigEndian(at: 8, as: UInt64.self)
        let length = Int(bytes.bigEndian(at: 16, as: UInt32.self))
        guard offset != 0 else { return }
        guard length <= Qcow2Header.maximumBackingNameLength, length <= bytes.byteCount,
            offset <= UInt64(bytes.byteCount - length)
        else { throw .corrupt(name, "the backing file name lies outside the first cluster") }
    }

    private static func tableOffset(
        _ bytes: RawSpan, at position: Int, _ geometry: Qcow2Geometry, _ name: String,
        _ table: String
    ) throws(ImageError) -> Int64 {
        // No table is longer than 32 MiB, so nothing overflows behind this limit.
        guard let offset = Int64(exactly: bytes.bigEndian(at: position, as: UInt64.self)),
            offset % geometry.clusterSize == 0, offset <= Int64.max - (1 << 40)
        else { throw .corrupt(name, "the offset of the \(table) is invalid") }
        return offset
    }

    private mutating func parseExtensions(
        _ bytes: RawSpan, from start: Int, _ name: String
    ) throws(ImageError) {
        try Qcow2HeaderParser.forEachExtension(bytes, from: start, name) {
            type, content throws(ImageError) in
            if type == Qcow2Header.ExtensionType.bitmaps { try parseBitmaps(content, name) }
            if type == Qcow2Header.ExtensionType.encryption {
                encryptionHeader = Qcow2Header.TableRange(content)
                guard encryptionHeader != nil else {
                    throw .corrupt(name, "the encryption header extension has a wrong length")
                }
            }
        }
    }

    private mutating func parseBitmaps(_ bytes: RawSpan, _ name: String) throws(ImageError) {
        // The spec: without this bit the extension is stale and its clusters are nobody's.
        guard autoclearFeatures & Qcow2Header.AutoclearFeature.bitmaps != 0 else { return }
        guard bytes.byteCount == 24 else {
            throw .corrupt(name, "the bitmaps extension has a wrong length")
        }
        let count = Int(bytes.bigEndian(at: 0, as: UInt32.self))
        let directory = Qcow2Header.TableRange(
            offset: bytes.bigEndian(at: 16, as: UInt64.self),
            length: bytes.bigEndian(at: 8, as: UInt64.self))
        guard (1...Self.maximumBitmaps).contains(count),
            directory.length <= Self.maximumBitmapDirectory,
            directory.offset % UInt64(geometry.clusterSize) == 0
        else { throw .corrupt(name, "the bitmaps extension is invalid") }
        bitmaps = Bitmaps(count: count, directory: directory)
    }
}
