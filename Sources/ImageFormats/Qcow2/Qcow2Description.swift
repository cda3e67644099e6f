import DiskImage
import ImageStorage

/// A qcow2 image described by itself, also one that cannot be read: encrypted, with its data in
/// another file, damaged below its header. No table of clusters is looked at.
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

    var refcountBits: Int { header.refcountBits }

    /// - Throws: `ImageError` for anything that is no qcow2 image, or is damaged in what it says.
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
        // The header has the place of LUKS's, if that is the method.
        if header.encryptionMethod == Qcow2Header.luks, let place = header.encryptionHeader {
            encryption = .luks(try await LUKSHeader.read(from: storage, at: place))
        } else {
            encryption = header.encryptionMethod == 0 ? nil : .aes
        }
    }
}
