import DiskImage
import ImageStorage

/// What a qcow2 image says of itself, also one that cannot be read: encrypted, with its data in another
/// file, damaged below its header. No table of clusters is looked at.
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
    /// The external data file, as written in the image; nil if none is named.
    let dataFile: String?
    /// nil where the image holds its data itself.
    let dataFileIsRaw: Bool?
    let snapshots: [Qcow2Snapshot]
    let bitmaps: [Qcow2Bitmap]

    var refcountBits: Int { header.extras.refcountBits }

    /// - Throws: `ImageError` for anything that is no qcow2 image, or is damaged in what it says.
    static func read(from storage: any Storage) async throws -> Qcow2Description {
        let header = try await Qcow2Header.read(from: storage, for: .describing)
        return try await Qcow2Description(header, storage)
    }

    private init(_ header: Qcow2Header, _ storage: any Storage) async throws {
        self.header = header
        let extras = header.extras
        typealias Feature = Qcow2Header.IncompatibleFeature
        isDirty = extras.incompatibleFeatures & Feature.dirty != 0
        isCorrupt = extras.incompatibleFeatures & Feature.corrupt != 0
        hasLazyRefcounts = header.hasLazyRefcounts
        dataFile = extras.dataFile
        dataFileIsRaw =
            extras.incompatibleFeatures & Feature.externalDataFile == 0
            ? nil : extras.autoclearFeatures & Qcow2Header.AutoclearFeature.rawDataFile != 0
        snapshots = try await Qcow2Snapshot.readAll(
            storage, at: extras.snapshotTableOffset, count: Int64(extras.snapshots))
        if let directory = extras.bitmapDirectory {
            bitmaps = try await Qcow2Bitmap.readAll(storage, directory, header.geometry)
        } else {
            bitmaps = []
        }
        switch extras.encryptionMethod {
        case 0: encryption = nil
        case 1: encryption = .aes
        case 2:
            guard let place = extras.encryptionHeader else {
                throw ImageError.corrupt(
                    storage.name, "the image is encrypted by LUKS and has no LUKS header")
            }
            encryption = .luks(try await LUKSHeader.read(from: storage, at: place))
        default:
            throw ImageError.unsupported(
                storage.name, "encryption method \(extras.encryptionMethod) is not supported")
        }
    }
}
