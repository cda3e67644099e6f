import DiskImage
import ImageStorage

/// Turns the bytes of a first cluster into a header. Pure; every number is hostile until checked.
struct Qcow2HeaderParser {
    enum Purpose {
        /// Of the guest disk: encrypted ones cannot be.
        case reading
        /// Of what the image says of itself, all of it.
        case describing
    }

    let name: String
    let purpose: Purpose
    private var version = 0
    private var clusterBits = 0
    private var headerLength = Qcow2Header.version2Length

    init(name: String, purpose: Purpose) {
        self.name = name
        self.purpose = purpose
    }

    /// Reads what there is of the first cluster, after a look at what decides how long that is.
    mutating func readFirstCluster(of storage: any Storage) async throws -> IOBuffer {
        var fixed = try IOBuffer(
            byteCount: Int(min(storage.size, Int64(Qcow2Header.extendedLength))))
        var bytes = fixed.mutableBytes
        try await storage.read(into: &bytes, at: 0)
        let clusterSize = try parseFixedPart(fixed.bytes)
        var cluster = try IOBuffer(byteCount: Int(min(storage.size, clusterSize)))
        bytes = cluster.mutableBytes
        try await storage.read(into: &bytes, at: 0)
        return cluster
    }

    /// - Returns: the cluster size in bytes.
    private mutating func parseFixedPart(_ bytes: RawSpan) throws(ImageError) -> Int64 {
        guard bytes.byteCount >= Qcow2Header.version2Length,
            bytes.bigEndian(at: 0, as: UInt32.self) == Qcow2Header.magic
        else { throw .corrupt(name, "is not a qcow2 image") }
        version = Int(bytes.bigEndian(at: 4, as: UInt32.self))
        guard version == 2 || version == 3 else {
            throw .unsupported(name, "qcow2 version \(version) is not supported")
        }
        clusterBits = Int(bytes.bigEndian(at: 20, as: UInt32.self))
        guard Qcow2Geometry.allowedClusterBits.contains(clusterBits) else {
            throw .corrupt(name, "cluster size of 2^\(clusterBits) bytes is not allowed")
        }
        if version == 3 {
            guard bytes.byteCount >= Qcow2Header.version3Length else {
                throw .corrupt(name, "the header is cut short")
            }
            headerLength = Int(bytes.bigEndian(at: 100, as: UInt32.self))
            guard headerLength >= Qcow2Header.version3Length, headerLength % 8 == 0,
                headerLength <= 1 << clusterBits
            else { throw .corrupt(name, "header length of \(headerLength) bytes is not allowed") }
        }
        return 1 << Int64(clusterBits)
    }

    /// - Parameter bytes: the first cluster, or less of it if the file ends before.
    func parse(_ bytes: RawSpan) throws(ImageError) -> Qcow2Header {
        guard bytes.byteCount >= headerLength else {
            throw .corrupt(name, "the header is cut short")
        }
        let extensions = try parseExtensions(bytes)
        let features =
            version == 3 ? bytes.bigEndian(at: 72, as: UInt64.self) : 0
        try checkFeatures(features, names: extensions.featureNames)
        var extras = Qcow2Header.Extras()
        extras.encryptionMethod = bytes.bigEndian(at: 32, as: UInt32.self)
        try checkEncryption(extras.encryptionMethod)
        extras.encryptionHeader = extensions.encryptionHeader
        extras.dataFile = extensions.dataFile
        extras.hasUnknownParts =
            extensions.hasUnknownOnes || headerLength > Qcow2Header.extendedLength
        extras.snapshots = bytes.bigEndian(at: 60, as: UInt32.self)
        extras.snapshotTableOffset = bytes.bigEndian(at: 64, as: UInt64.self)
        if version == 3 {
            let refcountOrder = bytes.bigEndian(at: 96, as: UInt32.self)
            guard refcountOrder <= 6 else {
                throw .corrupt(name, "refcounts of 2^\(refcountOrder) bits are not allowed")
            }
            extras.refcountBits = 1 << Int(refcountOrder)
            extras.incompatibleFeatures = features
            extras.compatibleFeatures = bytes.bigEndian(at: 80, as: UInt64.self)
            extras.autoclearFeatures = bytes.bigEndian(at: 88, as: UInt64.self)
            if extras.autoclearFeatures & Qcow2Header.AutoclearFeature.bitmaps != 0 {
                extras.bitmapDirectory = extensions.bitmapDirectory
            }
        }
        let hasExtendedL2 = features & Qcow2Header.IncompatibleFeature.extendedL2 != 0
        guard !hasExtendedL2 || 1 << clusterBits >= Qcow2Geometry.smallestExtendedCluster else {
            throw .corrupt(name, "extended L2 entries need clusters of 16 KiB or more")
        }
        guard let virtualSize = Int64(exactly: bytes.bigEndian(at: 24, as: UInt64.self)),
            virtualSize <= largestDiskSize
        else { throw .tooLarge("the virtual size", path: name) }
        let geometry = Qcow2Geometry(
            clusterBits: clusterBits, hasExtendedL2: hasExtendedL2, virtualSize: virtualSize)
        let l1 = try parseL1(bytes, geometry)
        let refcountTable = Int64(truncatingIfNeeded: bytes.bigEndian(at: 48, as: UInt64.self))
        guard refcountTable % geometry.clusterSize == 0 else {
            throw .corrupt(name, "the offset of the refcount table is invalid")
        }
        let header = Qcow2Header(
            version: version, geometry: geometry,
            compression: try parseCompression(bytes, features),
            backingFile: try parseBackingName(bytes), backingFormat: extensions.backingFormat,
            l1Offset: l1.offset, l1Entries: l1.entries,
            refcountTableOffset: HostOffset(refcountTable),
            refcountTableClusters: Int64(bytes.bigEndian(at: 56, as: UInt32.self)),
            extras: extras)
        if purpose == .describing { try checkTables(of: header, bytes) }
        return header
    }

    /// Nobody uses the refcount table to describe an image, yet one where it is wrong is none.
    private func checkTables(of header: Qcow2Header, _ bytes: RawSpan) throws(ImageError) {
        let clusterSize = header.geometry.clusterSize
        if let format = header.backingFormat, format.utf8.count > 15 {
            throw .corrupt(
                name, "the name of the backing format is too long: \(format.utf8.count) bytes")
        }
        guard bytes.bigEndian(at: 8, as: UInt64.self) <= UInt64(clusterSize) else {
            throw .corrupt(name, "the backing file name lies outside the first cluster")
        }
        guard header.extras.snapshotTableOffset % UInt64(clusterSize) == 0 else {
            throw .corrupt(name, "the offset of the snapshot table is invalid")
        }
        let tableLength = header.refcountTableClusters * clusterSize
        guard tableLength > 0 else { throw .corrupt(name, "the image has no refcount table") }
        guard tableLength <= Qcow2Layout.maximumRefcountTable else {
            throw .corrupt(name, "the refcount table is too large: \(tableLength) bytes")
        }
        guard (0...Int64.max - tableLength).contains(header.refcountTableOffset.bytes) else {
            throw .corrupt(name, "the offset of the refcount table is invalid")
        }
    }

    private func checkFeatures(_ features: UInt64, names: [Int: String]) throws(ImageError) {
        let unknown = features & ~Qcow2Header.IncompatibleFeature.known
        if unknown != 0 {
            let list = (0..<64).filter { unknown & (1 << UInt64($0)) != 0 }
                .map { names[$0].map { "'\($0)'" } ?? "bit \($0)" }
            throw .unsupported(
                name, "unsupported qcow2 feature(s): \(list.joined(separator: ", "))")
        }
        if purpose == .reading, features & Qcow2Header.IncompatibleFeature.externalDataFile != 0 {
            throw .unsupported(name, "external data files are not supported")
        }
    }

    private func checkEncryption(_ method: UInt32) throws(ImageError) {
        guard method != 0, purpose == .reading else { return }
        throw .unsupported(name, "encrypted images are not supported (method \(method))")
    }

    private func parseCompression(
        _ bytes: RawSpan, _ features: UInt64
    ) throws(ImageError) -> Qcow2Compression {
        let number =
            version == 3 && headerLength > Qcow2Header.version3Length
            ? bytes.unsafeLoad(fromByteOffset: Qcow2Header.version3Length, as: UInt8.self) : 0
        let isFlagged = features & Qcow2Header.IncompatibleFeature.compressionType != 0
        guard let type = Qcow2Compression(headerNumber: number) else {
            throw .unsupported(name, "compression type \(number) is not supported")
        }
        guard isFlagged == (type != .zlib) else {
            throw .corrupt(
                name, "the compression type (\(type)) contradicts the incompatible feature bits")
        }
        return type
    }

    private func parseL1(
        _ bytes: RawSpan, _ geometry: Qcow2Geometry
    ) throws(ImageError) -> (offset: HostOffset, entries: Int64) {
        let entries = Int64(bytes.bigEndian(at: 36, as: UInt32.self))
        guard entries <= Qcow2Header.maximumL1Entries else {
            throw .corrupt(name, "the L1 table is too large: \(entries) entries")
        }
        guard entries >= geometry.l1Entries else {
            throw .corrupt(
                name,
                "the L1 table is too small: \(entries) entries, the virtual size needs "
                    + "\(geometry.l1Entries)")
        }
        guard let offset = Int64(exactly: bytes.bigEndian(at: 40, as: UInt64.self)),
            offset % geometry.clusterSize == 0, offset <= Int64.max - entries * 8
        else { throw .corrupt(name, "the offset of the L1 table is invalid") }
        return (HostOffset(offset), entries)
    }

    private func parseBackingName(_ bytes: RawSpan) throws(ImageError) -> ImageName? {
        let offset = bytes.bigEndian(at: 8, as: UInt64.self)
        let length = Int(bytes.bigEndian(at: 16, as: UInt32.self))
        guard offset != 0, length != 0 else { return nil }
        guard length <= Qcow2Header.maximumBackingNameLength else {
            throw .corrupt(name, "the backing file name is too long: \(length) bytes")
        }
        guard length <= bytes.byteCount, offset >= UInt64(headerLength),
            offset <= UInt64(bytes.byteCount - length)
        else {
            throw .corrupt(name, "the backing file name lies outside the first cluster")
        }
        // A name that begins with its end names nothing.
        let found = bytes.extracting(Int(offset)..<Int(offset) + length).bytesToNUL()
        return found.isEmpty ? nil : ImageName(bytes: found)
    }

    private struct Extensions {
        var backingFormat: String?
        var featureNames: [Int: String] = [:]
        var bitmapDirectory: Qcow2BitmapDirectory?
        var encryptionHeader: Qcow2Header.TableRange?
        var dataFile: String?
        var hasUnknownOnes = false
    }

    private func parseExtensions(_ bytes: RawSpan) throws(ImageError) -> Extensions {
        var found = Extensions()
        try Self.forEachExtension(bytes, from: headerLength, name) { type, content in
            switch type {
            case Qcow2Header.ExtensionType.backingFormat: found.backingFormat = content.text()
            case Qcow2Header.ExtensionType.featureNames:
                found.featureNames = incompatibleNames(content)
            case Qcow2Header.ExtensionType.bitmaps:
                found.bitmapDirectory = Qcow2BitmapDirectory(content)
            case Qcow2Header.ExtensionType.encryption:
                found.encryptionHeader = Qcow2Header.TableRange(content)
            case Qcow2Header.ExtensionType.dataFile: found.dataFile = content.text()
            default: found.hasUnknownOnes = true  // The spec: they are to be ignored.
            }
        }
        return found
    }

    /// Walks the extensions, up to their end mark or to the name of the backing file.
    ///
    /// - Parameters:
    ///   - bytes: the first cluster.
    ///   - start: where the fixed part of the header ends.
    static func forEachExtension(
        _ bytes: RawSpan, from start: Int, _ name: String,
        _ body: (_ type: UInt32, _ content: RawSpan) throws(ImageError) -> Void
    ) throws(ImageError) {
        let backingOffset = bytes.bigEndian(at: 8, as: UInt64.self)
        let end =
            backingOffset == 0 ? bytes.byteCount : Int(min(backingOffset, UInt64(bytes.byteCount)))
        var position = start
        while position + 8 <= end {
            let type = bytes.bigEndian(at: position, as: UInt32.self)
            let length = Int(bytes.bigEndian(at: position + 4, as: UInt32.self))
            position += 8
            // Of the last one, too: qemu opens no image with an end mark of a wrong length.
            guard length <= end - position else {
                throw .corrupt(name, "a header extension reaches beyond the header")
            }
            if type == Qcow2Header.ExtensionType.end { break }
            try body(type, bytes.extracting(position..<position + length))
            position += length.roundedUp(to: 8)
        }
    }

    /// The feature name table: entries of kind (1 byte, 0 = incompatible), bit (1 byte), name (46).
    private func incompatibleNames(_ bytes: RawSpan) -> [Int: String] {
        var names: [Int: String] = [:]
        for start in stride(from: 0, through: bytes.byteCount - 48, by: 48)
        where bytes.unsafeLoad(fromByteOffset: start, as: UInt8.self) == 0 {
            let bit = Int(bytes.unsafeLoad(fromByteOffset: start + 1, as: UInt8.self))
            names[bit] = bytes.extracting(start + 2..<start + 48).text()
        }
        return names
    }
}

extension Qcow2Header.TableRange {
    /// The extension that says where the encryption header is; nil if its length is wrong.
    init?(_ content: RawSpan) {
        guard content.byteCount == 16 else { return nil }
        offset = content.bigEndian(at: 0, as: UInt64.self)
        length = content.bigEndian(at: 8, as: UInt64.self)
    }
}

extension RawSpan {
    /// The bytes up to the first NUL byte.
    func bytesToNUL() -> [UInt8] { withUnsafeBytes { Array($0.prefix { $0 != 0 }) } }

    /// The text up to the first NUL byte.
    func text() -> String { bytesToNUL().text }
}
