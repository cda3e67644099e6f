import Concurrency
import DiskImage
import ImageStorage
import Synchronization

/// One qcow2 image as a guest disk, without its backing file.
public final class Qcow2Source: Image {
    public let header: Qcow2Header
    public let storage: any Storage
    /// The data file; nil if the image has none or is not yet open.
    private let data: (any Storage)?
    private let tables: Qcow2Tables
    /// nil if the image is not encrypted.
    let encryption: Qcow2Encryption?
    /// The answer of `isPreallocated`; nil until it is known.
    private let knownPreallocation = Mutex<Bool?>(nil)
    private let decompressors: ResourcePool<Qcow2Decompressor>
    /// Buffers for compressed streams.
    private let inputs = IOBufferPool()

    /// Opens an image: reads the header and the L1 table.
    ///
    /// - Throws: `ImageError` for images that are damaged, cut short, encrypted by another key or
    ///   otherwise unreadable.
    public convenience init(_ storage: any Storage, key: ImageKey = ImageKey()) async throws {
        let header = try await Qcow2Header.read(from: storage)
        try await self.init(
            storage, header: header,
            encryption: Qcow2Encryption.open(header, in: storage, key))
    }

    /// Opens the disk as it was when a snapshot was taken. As in qemu, its size is the present one.
    ///
    /// - Throws: `ImageError`, also if the image has no such snapshot.
    convenience init(
        _ storage: any Storage, snapshot: SnapshotName, key: ImageKey = ImageKey()
    ) async throws {
        let header = try await Qcow2Header.read(from: storage)
        let encryption = try await Qcow2Encryption.open(header, in: storage, key)
        let snapshots = try await Qcow2Snapshot.readAll(of: header, in: storage)
        guard let found = snapshot.find(in: snapshots) else {
            throw ImageError(
                .invalid, path: storage.name, "Failed to load snapshot: Can't find snapshot"
            ).asQemu(standsAlone: true)
        }
        try await self.init(
            storage, header: header.of(found, in: storage.name), encryption: encryption)
    }

    /// - Parameters:
    ///   - header: the image's header, or a changed one that leads to another disk in the image.
    ///   - data: the data file, if the image has one.
    init(
        _ storage: any Storage, header: Qcow2Header, data: (any Storage)? = nil,
        encryption: Qcow2Encryption? = nil
    ) async throws {
        guard encryption != nil || header.encryptionFormat == nil else {
            throw ImageError.unsupported(storage.name, "the image is encrypted")
        }
        self.storage = storage
        self.header = header
        self.data = data
        self.encryption = encryption
        tables = try await Qcow2Tables(storage: storage, header: header)
        decompressors = ResourcePool { () throws(ImageError) in
            try Qcow2Decompressor(header.compression)
        }
    }

    private init(_ image: Qcow2Source, data: any Storage) {
        storage = image.storage
        header = image.header
        self.data = data
        encryption = image.encryption
        tables = image.tables
        decompressors = image.decompressors
    }

    public var dataStorage: any Storage { data ?? storage }
    public var needsDataFile: Bool { header.hasDataFile }
    public var dataFile: HostPath? { header.dataFile }

    public func reading(dataFrom storage: any Storage) -> any Image {
        Qcow2Source(self, data: storage)
    }

    public var virtualSize: Int64 { header.geometry.virtualSize }
    public var readGranularity: Int64 { header.geometry.clusterSize }
    public var backing: BackingName? { header.backing }

    /// Whether clusters lack blocks. Nearly every image has holes in its tables, so a hole alone
    /// tells nothing.
    public func isSparse() async throws -> Bool {
        guard dataStorage.traits.hasHoles else { return false }
        // A data file holds no tables.
        if data != nil { return true }
        return try await isPreallocated()
    }

    public func mappings(
        at offset: Int64, limit: Int64, holes: HoleSearch
    ) async throws -> [Mapping] {
        guard !header.hasDataFile || data != nil else {
            throw ImageError.unsupported(storage.name, "'data-file' is required for this image")
        }
        let found = try await tables.mappings(at: offset, limit: limit)
        guard encryption == nil else { return found.map(Self.encrypted) }
        return try await settled(found, clusterSize: header.geometry.clusterSize, holes)
    }

    /// A mapping as the tables of an encrypted image tell it. Holes mean nothing there: decrypted,
    /// zeros are noise. Places without data are left out, as in qemu, because nothing there could
    /// be used as it is.
    private static func encrypted(_ mapping: Mapping) -> Mapping {
        var mapping = mapping
        switch mapping.content {
        case .data: mapping.content = .encrypted
        case .compressed: break
        default: mapping.host = nil
        }
        return mapping
    }

    public func readEncrypted(
        _ mapping: Mapping, into buffer: inout MutableRawSpan
    ) async throws {
        try await encryption?.read(mapping, from: dataStorage, into: &buffer)
    }

    /// False if the refcounts cannot be read, because the disk can be read without them.
    public func isPreallocated() async throws -> Bool {
        if let known = knownPreallocation.withLock({ $0 }) { return known }
        let found: Bool
        do {
            found = try await isLikelyPreallocated()
        } catch is ImageError {
            found = false
        }
        knownPreallocation.withLock { $0 = found }
        return found
    }
}

// Reading compressed clusters: one call reads the streams of neighbours in the file.
extension Qcow2Source {
    /// Largest length of such a read in bytes. Longer ones save nothing more where reading is
    /// copying, and cost memory for every worker.
    private var longestRead: Int64 { storage.readMeter.isWaiting ? 256 << 10 : 64 << 10 }

    public func readCompressed(
        _ mappings: ArraySlice<Mapping>, into buffer: inout MutableRawSpan
    ) async throws {
        let start = mappings.first?.range.lowerBound ?? 0
        var rest = mappings
        let longestRead = longestRead
        while let first = rest.first {
            let (clusters, host) = try neighbours(rest, longestRead)
            rest = rest[clusters.endIndex...]
            let end = clusters[clusters.endIndex - 1].range.upperBound
            var part = buffer.slice(Int(first.range.lowerBound - start)..<Int(end - start))
            try await readCompressed(clusters, host, longestRead, into: &part)
        }
    }

    /// Returns the clusters at the front whose streams one call can read, and the place of all
    /// these streams.
    private func neighbours(
        _ mappings: ArraySlice<Mapping>, _ longestRead: Int64
    ) throws(ImageError) -> (ArraySlice<Mapping>, host: Range<Int64>) {
        var host = try streamRange(mappings[mappings.startIndex])
        var index = mappings.startIndex + 1
        while index < mappings.endIndex {
            let next = try streamRange(mappings[index])
            // Streams share sectors, so the counted ends of neighbours overlap.
            guard next.lowerBound >= host.lowerBound, next.lowerBound <= host.upperBound,
                next.upperBound - host.lowerBound <= longestRead
            else { break }
            host = host.lowerBound..<max(host.upperBound, next.upperBound)
            index += 1
        }
        return (mappings[..<index], host)
    }

    /// The place of a stream, clipped to the file: the last stream may end with the file.
    private func streamRange(_ mapping: Mapping) throws(ImageError) -> Range<Int64> {
        let host = mapping.host ?? 0..<0
        guard host.lowerBound < storage.size else {
            throw missingCluster("compressed", at: host.lowerBound, guest: mapping.layerOffset)
        }
        return host.clamped(to: 0..<storage.size)
    }

    /// - Parameter host: place of all the streams.
    private func readCompressed(
        _ clusters: ArraySlice<Mapping>, _ host: Range<Int64>, _ longestRead: Int64,
        into buffer: inout MutableRawSpan
    ) async throws {
        // Buffers of one size are reused, because many threads that allocate and free odd sizes
        // scatter the heap. The size has room for a stream that saved nothing and is a little
        // longer than its cluster.
        let usual = Int(longestRead) + 1024
        var input = try inputs.take(
            byteCount: host.count <= usual ? usual : host.count.roundedUp(to: 64 << 10))
        var all = input.mutableBytes
        var inputSpan = all.slice(0..<host.count)
        try await storage.read(into: &inputSpan, at: host.lowerBound)

        // Taken only now: nothing waits from here on, so there are never more decompressors than
        // threads.
        let decompressor = try decompressors.take()
        defer { decompressors.giveBack(decompressor) }
        let start = clusters.first?.range.lowerBound ?? 0
        for cluster in clusters {
            let stream = try streamRange(cluster)
            let bytes = input.bytes.extracting(
                Int(stream.lowerBound - host.lowerBound)..<Int(stream.upperBound - host.lowerBound))
            let place =
                Int(cluster.range.lowerBound - start)..<Int(cluster.range.upperBound - start)
            var part = buffer.slice(place)
            do throws(Qcow2Decompressor.Failure) {
                try decompress(bytes, with: decompressor, from: cluster.layerOffset, into: &part)
            } catch {
                if error == .noMemory { throw ImageError.outOfMemory() }
                throw ImageError.corrupt(
                    storage.name,
                    "cannot decompress the cluster of guest offset "
                        + "\(cluster.layerOffset.roundedDown(to: readGranularity)) at offset "
                        + "\(stream.lowerBound): \(error)")
            }
        }
        inputs.giveBack(input)
    }

    /// Decompresses the bytes that are wanted of a cluster.
    ///
    /// - Parameter offset: guest offset in bytes of the first of them.
    private func decompress(
        _ stream: RawSpan, with decompressor: Qcow2Decompressor, from offset: Int64,
        into buffer: inout MutableRawSpan
    ) throws(Qcow2Decompressor.Failure) {
        let clusterSize = Int(readGranularity)
        if buffer.byteCount == clusterSize {
            return try decompressor.decompress(stream, into: &buffer)
        }
        // Only a part of the cluster is wanted, or the disk ends within it.
        var whole: IOBuffer
        do { whole = try IOBuffer(byteCount: clusterSize) } catch { throw .noMemory }
        var span = whole.mutableBytes
        try decompressor.decompress(stream, into: &span)
        let skipped = Int(offset % readGranularity)
        let source = whole.bytes.extracting(skipped..<skipped + buffer.byteCount)
        buffer.withUnsafeMutableBytes { destination in
            source.withUnsafeBytes { destination.copyMemory(from: $0) }
        }
    }
}
