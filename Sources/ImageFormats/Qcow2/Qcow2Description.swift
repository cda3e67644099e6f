import DiskImage
import ImageStorage

/// The description of a qcow2 image by its own metadata, available even if the disk cannot be read
/// (encrypted, data in another file, damaged below the header). Tables of clusters are not read.
///
/// Source: QEMU's docs/interop/qcow2.txt.
struct Qcow2Description: Sendable, Equatable {
    enum Encryption: Sendable, Equatable {
        case aes
        case luks(LUKSHeader)
    }

    let header: Qcow2Header
    let isDirty: Bool
    let isCorrupt: Bool
    let hasLazyRefcounts: Bool
    let encryption: Encryption?
    /// Name of the external data file as written in the image; nil if none is named.
    let dataFile: String?
    /// Whether the external data file is raw; nil if the image holds its data itself.
    let dataFileIsRaw: Bool?
    let snapshots: [Qcow2Snapshot]
    let bitmaps: [Qcow2Bitmap]

    var refcountBits: Int { header.refcountBits }

    /// Reads all parts of the description.
    ///
    /// - Throws: `ImageError` if the storage holds no qcow2 image or one of these parts is damaged.
    static func read(from storage: any Storage) async throws -> Qcow2Description {
        let header = try await Qcow2Header.read(from: storage, for: .describing)
        return try await Qcow2Description(header, storage)
    }

    private init(_ header: Qcow2Header, _ storage: any Storage) async throws {
        self.header = header
        typealias Feature = Qcow2Header.IncompatibleFeature
        isDirty = header.incompatibleFeatures & Feature.dirty != 0
        isCorrupt = header.incompatibleFeatures & Feature.corrupt != 0
        hasLazyRefcounts = header.hasLazyRefcounts
        dataFile = header.dataFile
        dataFileIsRaw =
            header.incompatibleFeatures & Feature.externalDataFile == 0
            ? nil : header.autoclearFeatures & Qcow2Header.AutoclearFeature.rawDataFile != 0
        snapshots = try await Qcow2Snapshot.readAll(of: header, in: storage)
        if let directory = header.bitmapDirectory {
            bitmaps = try await Qcow2Bitmap.readAll(storage, directory, header.geometry)
        } else {
            bitmaps = []
        }
        // With LUKS, the qcow2 header tells the place of the LUKS header.
        if header.encryptionMethod == Qcow2Header.luks, let place = header.encryptionHeader {
            encryption = .luks(try await LUKSHeader.read(from: storage, at: place))
        } else {
            encryption = header.encryptionMethod == 0 ? nil : .aes
        }
    }
}
