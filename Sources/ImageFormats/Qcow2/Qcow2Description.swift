import DiskImage
import ImageStorage

/// The description of a qcow2 image by its own metadata, available even if the disk cannot be read
/// (encrypted, data in another file, damaged below the header). Tables of clusters are not read.
///
/// Source: QEMU's docs/interop/qcow2.txt.
struct Qcow2Description: Sendable, Equatable {
    let header: Qcow2Header
    /// nil unless the image is encrypted by LUKS.
    private var luks: LUKSHeader?
    let snapshots: [Qcow2Snapshot]
    private var bitmaps: [Qcow2Bitmap] = []

    /// Reads all parts of the description.
    ///
    /// - Throws: `ImageError` if the storage holds no qcow2 image or one of these parts is damaged.
    init(_ storage: any Storage) async throws {
        header = try await Qcow2Header.read(from: storage, for: .describing)
        snapshots = try await Qcow2Snapshot.readAll(of: header, in: storage)
        if let directory = header.bitmapDirectory {
            bitmaps = try await Qcow2Bitmap.readAll(storage, directory, header.geometry)
        }
        // With LUKS, the qcow2 header tells the place of the LUKS header.
        if header.encryptionMethod == Qcow2Header.luks, let place = header.encryptionHeader {
            luks = try await LUKSHeader.read(from: place.part(of: storage, "LUKS header"))
        }
    }

    private typealias Feature = Qcow2Header.IncompatibleFeature

    /// The image's facts for `info`.
    var facts: FormatFacts {
        FormatFacts(
            virtualSize: header.geometry.virtualSize.roundedDown(to: guestSectorSize),
            clusterSize: header.geometry.clusterSize, backing: header.backing,
            isDirty: header.incompatibleFeatures & Feature.dirty != 0,
            isEncrypted: header.encryptionMethod != 0, snapshots: snapshots.map(\.facts),
            details: details)
    }

    private var details: [JSONValue.Member] {
        let isModern = header.version >= 3
        var members: [JSONValue.Member] = [
            .init("compat", .string(isModern ? "1.1" : "0.10")),
            .init("compression-type", .string(header.compression.rawValue)),
        ]
        if isModern {
            members.append(.init("lazy-refcounts", .bool(header.hasLazyRefcounts)))
            if !bitmaps.isEmpty {
                members.append(.init("bitmaps", .array(bitmaps.map(Self.bitmap))))
            }
        }
        members.append(.init("refcount-bits", .integer(Int64(header.refcountBits))))
        if header.encryptionMethod != 0 {
            members.append(.init("encrypt", .object(encryption)))
        }
        guard isModern else { return members }
        if let file = header.dataFile {
            members.append(.init("data-file", .string(file.description)))
        }
        if header.hasDataFile {
            members.append(.init("data-file-raw", .bool(header.isDataFileRaw)))
        }
        return members + [
            .init("corrupt", .bool(header.incompatibleFeatures & Feature.corrupt != 0)),
            .init("extended-l2", .bool(header.geometry.hasExtendedL2)),
        ]
    }

    private static func bitmap(_ bitmap: Qcow2Bitmap) -> JSONValue {
        let flags = (bitmap.isInUse ? ["in-use"] : []) + (bitmap.isAuto ? ["auto"] : [])
        return .object([
            .init("flags", .array(flags.map { .string($0) })),
            .init("name", .string(bitmap.name)),
            .init("granularity", .integer(bitmap.granularity)),
        ])
    }

    private var encryption: [JSONValue.Member] {
        luks?.details(isPartOfImage: true) ?? [.init("format", .string("aes"))]
    }
}
