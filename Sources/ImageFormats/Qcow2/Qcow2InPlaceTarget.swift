import Concurrency
import DiskImage
import ImageStorage

/// An existing qcow2 image that is written where it stands: what is not written stays as it is.
final class Qcow2InPlaceTarget: ImageTarget {
    let traits: TargetTraits
    let compresses: Bool
    private let storage: any WritableStorage
    /// The data file; nil if the image holds its data itself.
    private let data: (any WritableStorage)?
    /// Length in bytes from which a run of zeros takes no space in the data file; 0 stores all.
    private let minSparse: Int
    /// Size of the guest disk in bytes.
    private let virtualSize: Int64
    private let encoder: Qcow2ClusterEncoder
    /// nil if the image is not encrypted.
    private let encryption: Qcow2Encryption?
    private let editor: Exclusive<Qcow2ImageEditor>
    /// Placements that are being written. Tables may lead to the data only afterwards.
    private let writes = InFlightCount()

    /// - Parameters:
    ///   - data: the data file; nil if the image holds its data itself.
    ///   - leavesBacking: whether the content leaves out what the backing file provides.
    ///   - tablesLimit: see `Qcow2ImageEditor`.
    /// - Throws: `ImageError` if the storage holds no qcow2 image, one that has errors, or one that
    ///   cannot be changed.
    init(
        _ storage: any WritableStorage, _ settings: TargetSettings,
        data: (any WritableStorage)? = nil, leavesBacking: Bool,
        encryption: Qcow2Encryption? = nil, tablesLimit: Int64 = Qcow2ImageEditor.tablesLimit
    ) async throws {
        let header = try await Qcow2Header.read(from: storage)
        guard header.encryptionFormat == nil || encryption != nil else {
            throw ImageError.unsupported(storage.name, "the image is encrypted")
        }
        guard header.encryptionFormat == nil || !settings.compress else {
            throw ImageError.invalid(
                "Compression and encryption not supported at the same time")
        }
        guard header.hasDataFile == (data != nil) else {
            throw ImageError(
                .invalid, path: storage.name, "'data-file' is required for this image")
        }
        guard !header.isDataFileRaw || header.encryptionFormat == nil else {
            throw ImageError.unsupported(
                storage.name, "an encrypted image with a raw data file can only be read")
        }
        guard data == nil || !settings.compress else {
            throw ImageError.invalid(
                "Compression and a data file not supported at the same time")
        }
        self.storage = storage
        self.data = data
        minSparse = Int(settings.minSparse)
        virtualSize = header.geometry.virtualSize
        self.encryption = encryption
        compresses = settings.compress
        let hasBacking = header.backingFile != nil || settings.getsBacking
        traits = TargetTraits(
            granularity: header.geometry.clusterSize,
            readsAsZeroFrom: settings.readsAsZero ? 0 : .max, hasBacking: leavesBacking,
            canWriteZeroes: header.version >= 3 || !hasBacking, placesInOrder: true)
        encoder = Qcow2ClusterEncoder(
            unit: header.geometry.clusterSize, keepsZeros: settings.minSparse == 0,
            zerosFrom: traits.canWriteZeroes ? 0 : traits.readsAsZeroFrom,
            compression: settings.compress ? header.compression : nil)
        editor = Exclusive(
            try await Qcow2ImageEditor(
                storage, header, data: data, hasBacking: hasBacking, tablesLimit: tablesLimit))
    }

    func encode(
        _ data: RawSpan, positions: Range<Int>, at guestOffset: Int64,
        into encoded: inout MutableRawSpan, used: inout Int
    ) throws -> [EncodedPiece] {
        try encoder.encode(data, positions, at: guestOffset, into: &encoded, used: &used)
    }

    func place(_ pieces: [EncodedPiece], encoded: RawSpan) async throws -> Placement {
        let needed = pieces.filter {
            $0.form != .zero || $0.guestRange.lowerBound < traits.readsAsZeroFrom
        }
        return try await editor.use { editor in
            if editor.isFull {
                try await writes.drain()
                try await editor.commit()
            }
            let placement = try await editor.place(needed, encoded: encoded)
            if !placement.writes.isEmpty { writes.begin() }
            return placement
        }
    }

    func seal(_ placement: Placement, data: inout MutableRawSpan) throws {
        try encryption?.cipher.seal(placement, data: &data, from: 0)
    }

    func write(
        _ placement: Placement, data: RawSpan, origin: BufferOrigin
    ) async throws {
        // Encrypted bytes have no origin whose blocks could be shared.
        let origin = encryption == nil ? origin : nil
        if let file = self.data {
            let parts = placement.divided(endOfData: virtualSize)
            // Encrypted zeros take space like all else.
            let isSparse = minSparse > 0 && encryption == nil
            let clusters = isSparse ? parts.data.sparse(data, minimum: minSparse) : parts.data
            try await file.writePlacement(clusters, data: data, origin: origin)
        } else {
            try await storage.writePlacement(placement, data: data, origin: origin)
        }
        writes.end()
    }

    func settle() async throws {
        try await editor.use { editor in
            try await writes.drain()
            try await editor.commit()
        }
    }

    func finish(virtualSize: Int64) async throws {
        try await editor.use { try await $0.finish() }
    }
}
