import Concurrency
import DiskImage
import ImageStorage
import Synchronization

/// A qcow2 image that is being written: clusters as they come, tables when they are complete, the
/// header last.
public final class Qcow2Target: ImageTarget {
    public let traits: TargetTraits
    public let compresses: Bool
    let storage: any WritableStorage
    /// The data file; nil if the image holds the data itself.
    let data: (any WritableStorage)?
    let options: Qcow2Options
    /// Whether data will be written; false for an empty image.
    let writesData: Bool
    let geometry: Qcow2Geometry
    /// nil if the image is not encrypted.
    private let encryption: Qcow2Encryption?
    /// The places of all clusters; nil if the image is not preallocated.
    private let preallocated: Qcow2PreallocatedMap?
    /// The ending of a preallocated image, which is known before the data is written.
    private let knownEnding = Mutex<Qcow2Layout.Ending?>(nil)
    private let layout: Mutex<Qcow2Layout>
    private let encoder: Qcow2ClusterEncoder

    /// Plans an image on empty storage.
    ///
    /// - Parameters:
    ///   - virtualSize: size of the guest disk in bytes; 0 if it becomes known at the end.
    ///   - compress: whether clusters are compressed where that makes them smaller.
    ///   - minSparse: 0 stores zeros like data; otherwise a cluster of zeros is not stored.
    ///   - writesData: false makes an image that holds nothing; only `prepare` and `finish` follow.
    ///   - data: the storage of the data file that the options name.
    /// - Throws: `ImageError` if options contradict each other or the size, or if there is not
    ///   enough memory.
    public init(
        storage: any WritableStorage, virtualSize: Int64, options: Qcow2Options, compress: Bool,
        minSparse: Int, writesData: Bool = true, data: (any WritableStorage)? = nil
    ) throws(ImageError) {
        precondition((data == nil) == (options.dataFile == nil))
        let geometry = try options.geometry(virtualSize: virtualSize)
        try MemoryMargin.check(for: Int(geometry.l1Entries) * 8)
        self.storage = storage
        self.data = data
        self.geometry = geometry
        self.options = options
        compresses = compress
        self.writesData = writesData
        encryption = options.encryption.map { Qcow2Encryption($0) }
        layout = Mutex(
            Qcow2Layout(
                geometry, refcountBits: options.refcountBits, blockSize: storage.traits.blockSize,
                hasDataFile: data != nil))
        let isPreallocated = options.placesAhead
        // A cluster that has a place reads as what its bytes are decrypted to.
        let storesAll = isPreallocated && encryption != nil
        preallocated =
            isPreallocated
            ? Qcow2PreallocatedMap(
                geometry: geometry,
                clustersPerBlock: RefcountBlock.count(
                    bits: options.refcountBits, byteCount: geometry.clusterSize)) : nil
        traits = TargetTraits(
            granularity: isPreallocated || compress
                ? geometry.clusterSize : geometry.subclusterSize,
            readsAsZeroFrom: storesAll || isPreallocated && !(data ?? storage).traits.readsAsZero
                ? .max : options.backing?.virtualSize ?? 0,
            hasBacking: options.backing != nil,
            canWriteZeroes: (options.version >= 3 || isPreallocated) && !storesAll,
            placesInOrder: !isPreallocated)
        encoder = Qcow2ClusterEncoder(
            unit: traits.granularity, keepsZeros: minSparse == 0 || storesAll,
            zerosFrom: traits.canWriteZeroes ? 0 : traits.readsAsZeroFrom,
            compression: compress ? options.compression : nil, level: options.compressionLevel)
        // Names that do not fit cause an error before the work.
        _ = try header(geometry, nil).serialized()
    }

    /// Clears an old image's header and preallocates. Has to be called first.
    public func prepare() async throws {
        try await storage.invalidateOldHeader(geometry.clusterSize)
        guard let preallocated else { return }
        // A device that becomes a raw data file keeps what it holds, as it does if it becomes a raw
        // image.
        let isStale = !(data ?? storage).traits.readsAsZero && !options.isDataFileRaw
        let fills = !writesData && (options.preallocation == .full || isStale)
        let ending = try await preallocate(preallocated, fillsWithZeros: fills)
        knownEnding.withLock { $0 = ending }
    }

    public func encode(
        _ data: RawSpan, positions: Range<Int>, at guestOffset: Int64,
        into encoded: inout MutableRawSpan, used: inout Int
    ) throws -> [EncodedPiece] {
        try encoder.encode(data, positions, at: guestOffset, into: &encoded, used: &used)
    }

    public func place(_ pieces: [EncodedPiece], encoded: RawSpan) throws -> Placement {
        let needed = pieces.filter {
            $0.form != .zero || $0.guestRange.lowerBound < traits.readsAsZeroFrom
        }
        if let preallocated {
            return data == nil ? preallocated.place(needed) : Placement(inDataFile: needed)
        }
        return try layout.withLock { layout throws(ImageError) in
            try layout.place(needed, encoded: encoded)
        }
    }

    public func seal(_ placement: Placement, data: inout MutableRawSpan) throws {
        try encryption?.cipher.seal(placement, data: &data, from: 0)
    }

    public func write(
        _ placement: Placement, data: RawSpan, origin: BufferOrigin
    ) async throws {
        // Encrypted bytes have no origin whose blocks could be shared.
        let origin = encryption == nil ? origin : nil
        if let file = self.data {
            let parts = placement.divided(endOfData: geometry.virtualSize)
            try await file.writePlacement(parts.data, data: data, origin: origin)
            return try await storage.writePlacement(parts.tables, data: RawSpan())
        }
        try await storage.writePlacement(placement, data: data, origin: origin)
        for write in placement.writes {
            if case .compressed(let run) = write.bytes { layout.withLock { $0.reuse(run) } }
        }
    }

    public func finish(virtualSize: Int64) async throws {
        let geometry = try options.geometry(virtualSize: virtualSize)
        let ending: Qcow2Layout.Ending
        if let known = knownEnding.withLock({ $0 }) {
            ending = known
        } else {
            ending = try layout.withLock { layout throws(ImageError) in
                try layout.finish(l1Entries: geometry.l1Entries, options.encryption)
            }
            try await storage.writePlacement(ending.placement, data: RawSpan())
            try await storage.truncate(to: ending.end.bytes)
        }
        try await data?.truncate(to: virtualSize)
        // Everything that the header leads to must be on stable storage before the header is.
        try await data?.flush()
        try await storage.flush()
        let header = try header(geometry, ending).serialized()
        try await storage.writeBytes(header, at: 0)
    }

    private func header(
        _ geometry: Qcow2Geometry, _ ending: Qcow2Layout.Ending?
    ) -> Qcow2Header {
        var header = Qcow2Header(options, geometry)
        guard let ending else { return header }
        header.l1Offset = ending.l1Offset
        header.refcountTableOffset = ending.refcountTableOffset
        header.refcountTableClusters = ending.refcountTableClusters
        header.encryptionHeader = ending.encryptionHeader
        return header
    }
}
