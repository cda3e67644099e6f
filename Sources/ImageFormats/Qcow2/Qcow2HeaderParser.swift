import DiskImage
import ImageStorage

/// Turns the bytes of a first cluster into a header. Pure; every number is hostile until checked.
struct Qcow2HeaderParser {
    enum Purpose {
        /// Reading the guest disk.
        case reading
        /// Describing the image by everything that it tells about itself.
        case describing
        /// Finding the tables: the check itself reports the errors in them.
        case checking
    }

    let name: String
    let purpose: Purpose
    private(set) var headerLength = Qcow2Header.version2Length
    /// The header as far as it has been parsed.
    private(set) var header = Qcow2Header(
        version: 0, geometry: Qcow2Geometry(clusterBits: 0, virtualSize: 0))

    /// Reads the first cluster, as far as the file has it. Its fixed part is read first, because
    /// that tells the cluster size.
    mutating func readFirstCluster(of storage: any Storage) async throws -> IOBuffer {
        var fixed = try IOBuffer(
            byteCount: Int(min(storage.size, Int64(Qcow2Header.extendedLength))))
        var bytes = fixed.mutableBytes
        try await storage.read(into: &bytes, at: 0)
        try parseFixedPart(fixed.bytes)
        var cluster = try IOBuffer(
            byteCount: Int(min(storage.size, header.geometry.clusterSize)))
        bytes = cluster.mutableBytes
        try await storage.read(into: &bytes, at: 0)
        return cluster
    }

    private mutating func parseFixedPart(_ bytes: RawSpan) throws(ImageError) {
        guard bytes.byteCount >= Qcow2Header.version2Length,
            bytes.bigEndian(at: 0, as: UInt32.self) == Qcow2Header.magic
        else {
            throw ImageError.corrupt(name, "is not a qcow2 image")
                .asQemu("Image is not in qcow2 format")
        }
        header.version = Int(bytes.bigEndian(at: 4, as: UInt32.self))
        guard header.version == 2 || header.version == 3 else {
            throw .unsupported(name, "Unsupported qcow2 version \(header.version)")
        }
        let clusterBits = Int(bytes.bigEndian(at: 20, as: UInt32.self))
        guard Qcow2Geometry.allowedClusterBits.contains(clusterBits) else {
            throw ImageError.corrupt(name, "cluster size of 2^\(clusterBits) bytes is not allowed")
                .asQemu("Unsupported cluster size: 2^\(clusterBits)")
        }
        header.geometry.clusterBits = clusterBits
        if header.version == 3 {
            guard bytes.byteCount >= Qcow2Header.version3Length else {
                throw .corrupt(name, "the header is cut short")
            }
            headerLength = Int(bytes.bigEndian(at: 100, as: UInt32.self))
            guard headerLength >= Qcow2Header.version3Length, headerLength % 8 == 0,
                headerLength <= 1 << clusterBits
            else { throw .corrupt(name, "header length of \(headerLength) bytes is not allowed") }
        }
    }

    /// - Parameter bytes: the first cluster, or its beginning if the file ends within it.
    mutating func parse(_ bytes: RawSpan) throws(ImageError) -> Qcow2Header {
        guard bytes.byteCount >= headerLength else {
            throw .corrupt(name, "the header is cut short")
        }
        try parseFields(bytes)
        try parseExtensions(bytes)
        try checkFeatures()
        try checkEncryption()
        try parseCompression(bytes)
        try parseGeometry(bytes)
        try parseL1(bytes)
        let refcountTable = Int64(truncatingIfNeeded: bytes.bigEndian(at: 48, as: UInt64.self))
        guard refcountTable % header.geometry.clusterSize == 0 else {
            throw .corrupt(name, "the offset of the refcount table is invalid")
        }
        header.refcountTableOffset = HostOffset(refcountTable)
        header.refcountTableClusters = Int64(bytes.bigEndian(at: 56, as: UInt32.self))
        header.backingFile = try parseBackingName(bytes)
        if purpose == .describing { try checkDescription(bytes) }
        if purpose != .reading { try checkRefcountTable() }
        return header
    }

    private mutating func parseFields(_ bytes: RawSpan) throws(ImageError) {
        header.encryptionMethod = bytes.bigEndian(at: 32, as: UInt32.self)
        header.snapshotCount = bytes.bigEndian(at: 60, as: UInt32.self)
        header.snapshotTableOffset = bytes.bigEndian(at: 64, as: UInt64.self)
        guard header.version >= 3 else { return }
        header.incompatibleFeatures = bytes.bigEndian(at: 72, as: UInt64.self)
        header.compatibleFeatures = bytes.bigEndian(at: 80, as: UInt64.self)
        header.autoclearFeatures = bytes.bigEndian(at: 88, as: UInt64.self)
        let refcountOrder = bytes.bigEndian(at: 96, as: UInt32.self)
        guard refcountOrder <= 6 else {
            throw .corrupt(name, "refcounts of 2^\(refcountOrder) bits are not allowed")
        }
        header.refcountBits = 1 << Int(refcountOrder)
        if headerLength > Qcow2Header.extendedLength {
            header.otherFields = bytes.extracting(Qcow2Header.extendedLength..<headerLength)
                .withUnsafeBytes { Array($0) }
        }
    }

    private mutating func parseGeometry(_ bytes: RawSpan) throws(ImageError) {
        header.geometry.hasExtendedL2 =
            header.incompatibleFeatures & Qcow2Header.IncompatibleFeature.extendedL2 != 0
        guard
            !header.geometry.hasExtendedL2
                || header.geometry.clusterSize >= Qcow2Geometry.smallestExtendedCluster
        else { throw .corrupt(name, "extended L2 entries need clusters of 16 KiB or more") }
        guard let virtualSize = Int64(exactly: bytes.bigEndian(at: 24, as: UInt64.self)),
            virtualSize <= largestDiskSize
        else { throw .tooLarge("the virtual size", path: name) }
        header.geometry.virtualSize = virtualSize
    }

    private func checkDescription(_ bytes: RawSpan) throws(ImageError) {
        if let format = header.backingFormat, format.utf8.count > 15 {
            throw .corrupt(
                name, "the name of the backing format is too long: \(format.utf8.count) bytes")
        }
        guard bytes.bigEndian(at: 8, as: UInt64.self) <= UInt64(header.geometry.clusterSize) else {
            throw .corrupt(name, "the backing file name lies outside the first cluster")
        }
        guard header.snapshotTableOffset % UInt64(header.geometry.clusterSize) == 0 else {
            throw .corrupt(name, "the offset of the snapshot table is invalid")
        }
        guard header.refcountTableClusters > 0 else {
            throw .corrupt(name, "the image has no refcount table")
        }
    }

    /// Throws if the size or offset of the refcount table is impossible. Reading does without the
    /// table; a check or description of such an image would make no sense.
    private func checkRefcountTable() throws(ImageError) {
        let length = header.refcountTableClusters * header.geometry.clusterSize
        guard length <= Qcow2Layout.maximumRefcountTable else {
            throw .corrupt(name, "the refcount table is too large: \(length) bytes")
        }
        guard (0...Int64.max - length).contains(header.refcountTableOffset.bytes) else {
            throw .corrupt(name, "the offset of the refcount table is invalid")
        }
    }

    private func checkFeatures() throws(ImageError) {
        let unknown = header.incompatibleFeatures & ~Qcow2Header.IncompatibleFeature.known
        if unknown != 0 {
            let list = header.names(ofIncompatible: unknown).joined(separator: ", ")
            throw .unsupported(name, "Unsupported qcow2 feature(s): \(list)")
        }
        guard purpose == .describing || header.hasDataFile || !header.isDataFileRaw else {
            throw .corrupt(name, "data-file-raw requires a data file")
        }
    }

    private func checkEncryption() throws(ImageError) {
        let method = header.encryptionMethod
        guard method != 0 else { return }
        guard method <= Qcow2Header.luks else {
            throw .unsupported(name, "encryption method \(method) is not supported")
        }
        guard method != Qcow2Header.luks || header.encryptionHeader != nil else {
            throw .corrupt(name, "the image is encrypted by LUKS and has no LUKS header")
        }
    }

    private mutating func parseCompression(_ bytes: RawSpan) throws(ImageError) {
        let number =
            headerLength > Qcow2Header.version3Length
            ? bytes.unsafeLoad(fromByteOffset: Qcow2Header.version3Length, as: UInt8.self) : 0
        let isFlagged =
            header.incompatibleFeatures & Qcow2Header.IncompatibleFeature.compressionType != 0
        guard let type = Qcow2Compression.allCases.first(where: { $0.headerNumber == number })
        else { throw .unsupported(name, "compression type \(number) is not supported") }
        guard isFlagged == (type != .zlib) else {
            throw .corrupt(
                name, "the compression type (\(type)) contradicts the incompatible feature bits")
        }
        header.compression = type
    }

    private mutating func parseL1(_ bytes: RawSpan) throws(ImageError) {
        let entries = Int64(bytes.bigEndian(at: 36, as: UInt32.self))
        guard entries <= Qcow2Header.maximumL1Entries else {
            throw ImageError.corrupt(name, "the L1 table is too large: \(entries) entries")
                .asQemu("Active L1 table too large")
        }
        guard entries >= header.geometry.l1Entries else {
            throw ImageError.corrupt(
                name,
                "the L1 table is too small: \(entries) entries, the virtual size needs "
                    + "\(header.geometry.l1Entries)"
            ).asQemu(
                header.geometry.l1Entries > Int64(Int32.max)
                    ? "Image is too big" : "L1 table is too small")
        }
        guard let offset = Int64(exactly: bytes.bigEndian(at: 40, as: UInt64.self)),
            offset % header.geometry.clusterSize == 0, offset <= Int64.max - entries * 8
        else { throw .corrupt(name, "the offset of the L1 table is invalid") }
        header.l1Offset = HostOffset(offset)
        header.l1Entries = entries
    }

    private func parseBackingName(_ bytes: RawSpan) throws(ImageError) -> ImageName? {
        let offset = bytes.bigEndian(at: 8, as: UInt64.self)
        let length = Int(bytes.bigEndian(at: 16, as: UInt32.self))
        guard offset != 0, length != 0 else { return nil }
        guard length <= Qcow2Header.maximumBackingNameLength else {
            throw .corrupt(name, "the backing file name is too long: \(length) bytes")
        }
        // A check accepts a name wherever qemu does. Otherwise a name that begins within the fields
        // of the header is an error.
        let start = purpose == .checking ? 0 : UInt64(headerLength)
        guard length <= bytes.byteCount, offset >= start,
            offset <= UInt64(bytes.byteCount - length)
        else {
            throw .corrupt(name, "the backing file name lies outside the first cluster")
        }
        // A name that begins with a NUL byte names nothing.
        let found = bytes.extracting(Int(offset)..<Int(offset) + length).bytesToNUL()
        return found.isEmpty ? nil : ImageName(bytes: found)
    }

    /// Reads the extensions up to their end mark or to the name of the backing file.
    private mutating func parseExtensions(_ bytes: RawSpan) throws(ImageError) {
        let backingOffset = bytes.bigEndian(at: 8, as: UInt64.self)
        let end =
            backingOffset == 0 ? bytes.byteCount : Int(min(backingOffset, UInt64(bytes.byteCount)))
        var position = headerLength
        while position + 8 <= end {
            let type = bytes.bigEndian(at: position, as: UInt32.self)
            let length = Int(bytes.bigEndian(at: position + 4, as: UInt32.self))
            position += 8
            // This is checked for the end mark, too: qemu opens no image whose end mark has a wrong
            // length.
            guard length <= end - position else {
                throw .corrupt(name, "a header extension reaches beyond the header")
            }
            if type == Qcow2Header.ExtensionType.end { break }
            try parse(type, bytes.extracting(position..<position + length))
            position += length.roundedUp(to: 8)
        }
    }

    private mutating func parse(_ type: UInt32, _ content: RawSpan) throws(ImageError) {
        switch type {
        case Qcow2Header.ExtensionType.backingFormat: header.backingFormat = content.text()
        case Qcow2Header.ExtensionType.bitmaps:
            header.bitmapExtension = Qcow2BitmapDirectory(content)
        case Qcow2Header.ExtensionType.encryption:
            header.encryptionHeader = Qcow2Header.TableRange(content)
            guard header.encryptionHeader != nil || purpose != .checking else {
                throw .corrupt(name, "the encryption header extension has a wrong length")
            }
        case Qcow2Header.ExtensionType.dataFile:
            let path = content.bytesToNUL()
            header.dataFile = path.isEmpty ? nil : HostPath(bytes: path)
        default:
            // Unknown extensions are to be ignored (spec, section "Header extensions").
            header.otherExtensions.append(
                .init(type: type, content: content.withUnsafeBytes { Array($0) }))
        }
    }
}

extension Qcow2Header {
    /// Names of incompatible features in the order of the image's table, and one for all that it
    /// does not name: qemu's words, which callers know. An entry consists of kind (1 byte, 0 for
    /// incompatible), bit (1 byte) and name (46 bytes); the last one may be cut short.
    fileprivate func names(ofIncompatible features: UInt64) -> [String] {
        var names: [String] = []
        var rest = features
        for table in otherExtensions where table.type == ExtensionType.featureNames {
            let bytes = table.content
            let length = Self.featureNameLength
            for start in stride(from: 0, to: bytes.count - 1, by: length) where bytes[start] == 0 {
                // A shift of 64 and more gives 0.
                let feature = UInt64(1) << UInt64(bytes[start + 1])
                guard rest & feature != 0 else { continue }
                rest &= ~feature
                names.append(bytes.text(start + 2..<min(start + length, bytes.count)))
            }
        }
        if rest != 0 {
            names.append("Unknown incompatible feature: \(String(rest, radix: 16))")
        }
        return names
    }
}

extension Qcow2Header.TableRange {
    /// Parses the extension that tells the place of the encryption header; nil if its length is
    /// wrong.
    init?(_ content: RawSpan) {
        guard content.byteCount == 16 else { return nil }
        offset = content.bigEndian(at: 0, as: UInt64.self)
        length = content.bigEndian(at: 8, as: UInt64.self)
    }

    /// The range as a storage of its own.
    ///
    /// - Parameter what: its name, for messages.
    /// - Throws: `ImageError` if the file does not hold all of it.
    func part(of storage: any Storage, _ what: String) throws(ImageError) -> StoragePart {
        let range = try range(in: storage, what)
        return try StoragePart(of: storage, offset: range.lowerBound, size: Int64(range.count))
    }

    /// The range in bytes; the parameters are those of `part`, which throws the same.
    func range(in storage: any Storage, _ what: String) throws(ImageError) -> Range<Int64> {
        guard let offset = Int64(exactly: offset), let length = Int64(exactly: length),
            offset <= storage.size, length <= storage.size - offset
        else {
            throw .corrupt(
                storage.name,
                "the \(what) at offset \(offset) lies beyond the end of the file "
                    + "(\(storage.size) bytes)")
        }
        return offset..<offset + length
    }
}

extension RawSpan {
    /// The bytes up to the first NUL byte.
    func bytesToNUL() -> [UInt8] { withUnsafeBytes { Array($0.prefix { $0 != 0 }) } }

    /// The text up to the first NUL byte.
    func text() -> String { bytesToNUL().text }
}
