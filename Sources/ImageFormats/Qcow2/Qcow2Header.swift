import DiskImage
import ImageStorage

/// The first cluster of a qcow2 image: header, extensions, backing file name.
///
/// Source: QEMU's docs/interop/qcow2.txt, sections "Header" and "Header extensions".
public struct Qcow2Header: Sendable, Equatable {
    /// The first four bytes of an image, "QFI\xfb", as a big-endian number.
    static let magic: UInt32 = 0x5146_49fb
    static let version2Length = 72
    static let version3Length = 104
    /// Length of a version 3 header with the compression type, padded to a multiple of 8.
    static let extendedLength = 112
    /// Largest number of L1 entries that qemu accepts: a table of 32 MiB.
    static let maximumL1Entries: Int64 = (32 << 20) / 8
    static let maximumBackingNameLength = 1023
    /// Number of the encryption method LUKS.
    static let luks: UInt32 = 2

    /// Offset of `changeableFields` in bytes.
    static let changeableOffset: Int64 = 24

    enum IncompatibleFeature {
        static let dirty: UInt64 = 1 << 0
        static let corrupt: UInt64 = 1 << 1
        static let externalDataFile: UInt64 = 1 << 2
        static let compressionType: UInt64 = 1 << 3
        static let extendedL2: UInt64 = 1 << 4
        static let known = dirty | corrupt | externalDataFile | compressionType | extendedL2
    }

    enum CompatibleFeature {
        static let lazyRefcounts: UInt64 = 1 << 0
    }

    enum AutoclearFeature {
        /// The last program that wrote to the image kept its bitmaps valid. Without this bit they
        /// are void.
        static let bitmaps: UInt64 = 1 << 0
        static let rawDataFile: UInt64 = 1 << 1
        static let known = bitmaps | rawDataFile
    }

    enum ExtensionType {
        static let end: UInt32 = 0
        static let backingFormat: UInt32 = 0xe279_2aca
        static let featureNames: UInt32 = 0x6803_f857
        static let bitmaps: UInt32 = 0x2385_2875
        static let encryption: UInt32 = 0x0537_be77
        static let dataFile: UInt32 = 0x4441_5441
    }

    public var version: Int
    public var geometry: Qcow2Geometry
    public var compression = Qcow2Compression.zlib
    /// Name as written in the image. A relative name counts from the image's folder.
    public var backingFile: ImageName?
    public var backingFormat: String?
    var l1Offset = HostOffset(0)
    var l1Entries: Int64 = 0
    var refcountTableOffset = HostOffset(0)
    var refcountTableClusters: Int64 = 0
    var refcountBits = 16
    var snapshotCount: UInt32 = 0
    var snapshotTableOffset: UInt64 = 0
    var incompatibleFeatures: UInt64 = 0
    var compatibleFeatures: UInt64 = 0
    var autoclearFeatures: UInt64 = 0
    /// Number of the encryption method; 0 for none.
    var encryptionMethod: UInt32 = 0
    /// Place of the LUKS header.
    var encryptionHeader: TableRange?
    /// The bitmap directory; stale unless `AutoclearFeature.bitmaps` is set.
    var bitmapExtension: Qcow2BitmapDirectory?
    /// Name of the external data file as written in the image.
    var dataFile: String?
    /// The table of feature names and all unknown extensions, kept to be written back.
    var otherExtensions: [Extension] = []
    /// Fields behind the known ones, kept to be written back.
    var otherFields: [UInt8] = []

    /// A range of the file in bytes that an image names, not checked against the file's size.
    struct TableRange: Sendable, Equatable {
        var offset: UInt64
        var length: UInt64
    }

    struct Extension: Sendable, Equatable {
        var type: UInt32
        var content: [UInt8]
    }

    /// The bitmap directory; nil if the image has none that can be trusted.
    var bitmapDirectory: Qcow2BitmapDirectory? {
        autoclearFeatures & AutoclearFeature.bitmaps != 0 ? bitmapExtension : nil
    }

    public var backing: BackingName? {
        backingFile.map { BackingName($0, format: backingFormat) }
    }

    var hasDataFile: Bool { incompatibleFeatures & IncompatibleFeature.externalDataFile != 0 }

    /// Whether the image has extensions or fields that are not known here.
    private var hasUnknownParts: Bool {
        !otherFields.isEmpty || otherExtensions.contains { $0.type != ExtensionType.featureNames }
    }

    /// Whether the image defers updates of its refcounts (`lazy_refcounts`).
    public var hasLazyRefcounts: Bool {
        compatibleFeatures & CompatibleFeature.lazyRefcounts != 0
    }

    /// Reason why an image created anew with the same options would differ from this one; nil if it
    /// would not.
    public var reasonNotToRebuild: String? {
        if encryptionFormat == .aes { return "clusters encrypted by AES" }
        if geometry.hasExtendedL2 { return "extended L2 entries" }
        if snapshotCount > 0 { return "internal snapshots" }
        if autoclearFeatures != 0 { return "bitmaps" }
        if refcountBits != 16 { return "refcounts of \(refcountBits) bits" }
        if incompatibleFeatures & IncompatibleFeature.corrupt != 0 {
            return "a mark that it is corrupt"
        }
        if compatibleFeatures & ~CompatibleFeature.lazyRefcounts != 0
            || hasUnknownParts
        {
            return "features that are not known here"
        }
        return nil
    }

    /// Reads and checks the header of an image.
    ///
    /// - Throws: `ImageError` if the storage holds no qcow2 image, or one that is damaged or not
    ///   supported.
    static func read(
        from storage: any Storage, for purpose: Qcow2HeaderParser.Purpose = .reading
    ) async throws -> Qcow2Header {
        var parser = Qcow2HeaderParser(name: storage.name, purpose: purpose)
        let cluster = try await parser.readFirstCluster(of: storage)
        return try parser.parse(cluster.bytes)
    }
}
