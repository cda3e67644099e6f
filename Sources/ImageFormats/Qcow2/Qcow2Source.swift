import Concurrency
import DiskImage
import ImageStorage

/// One qcow2 image as a guest disk, without what lies below it.
///
/// `extent` says `.backing` for what the image leaves to its backing file; `read` gives zeros
/// there.
public struct Qcow2Source: Image {
    public let header: Qcow2Header
    public let storage: any Storage
    let tables: Qcow2Tables
    private let decompressors: ResourcePool<Qcow2Decompressor>
    /// For what is to be decompressed.
    private let inputs = IOBufferPool()

    /// Opens an image: reads the header and the L1 table.
    ///
    /// - Throws: `ImageError` for damaged, cut, encrypted and otherwise unreadable images.
    public init(_ storage: any Storage) async throws {
        try await self.init(storage, header: Qcow2Header.read(from: storage))
    }

    /// Opens the disk as it was when a snapshot was taken. Its size is today's, as with qemu.
    ///
    /// - Throws: `ImageError`; also if the image has no such snapshot.
    init(_ storage: any Storage, snapshot: SnapshotName) async throws {
        let header = try await Qcow2Header.read(from: storage)
        let snapshots = try await Qcow2Snapshot.readAll(of: header, in: storage)
        guard let found = snapshot.find(in: snapshots) else {
            throw ImageError(
                .invalid, path: storage.name, "Failed to load snapshot: Can't find snapshot")
        }
        try await self.init(storage, header: header.of(found, in: storage.name))
    }

    /// - Parameter header: of the image, or what it could be.
    init(_ storage: any Storage, header: Qcow2Header) async throws {
        self.storage = storage
        self.header = header
        tables = try await Qcow2Tables(storage: storage, header: header)
        decompressors = ResourcePool { () throws(ImageError) in
            try Qcow2Decompressor(header.compression)
        }
    }

    public var virtualSize: Int64 { header.geometry.virtualSize }
    public var readGranularity: Int64 { header.geometry.clusterSize }
    public var backing: BackingName? {
        header.backingFile.map { BackingName($0, format: header.backingFormat) }
    }

    public func storedRuns() -> any StoredRunReader { Qcow2RunReader(self) }

    /// Nearly every image has holes in its tables, so more than one of any size counts: clusters
    /// without blocks.
    public func isSparse() async throws -> Bool {
        guard storage.traits.hasHoles else { return false }
        return try await isPreallocated()
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        var extent = try await shortExtent(at: offset, limit: limit)
        while extent.range.upperBound < limit {
            let next = try await shortExtent(at: extent.range.upperBound, limit: limit)
            guard next.content == extent.content else { break }
            extent.range = offset..<next.range.upperBound
        }
        return extent
    }

    private func shortExtent(at offset: Int64, limit: Int64) async throws -> Extent {
        let run = try await tables.run(at: offset, limit: limit)
        switch run.mapping {
        case .unallocated: return Extent(range: run.range, content: .backing)
        case .zero: return Extent(range: run.range, content: .zero)
        case .compressed: return Extent(range: run.range, content: .compressed)
        case .standard(let host):
            // Without holes only the end of the file is to be looked at.
            guard storage.traits.hasHoles || host.bytes >= storage.size else {
                return Extent(range: run.range, content: .data)
            }
            let piece = try await hostPiece(at: host, count: Int64(run.range.count))
            return Extent(
                range: run.range.lowerBound..<run.range.lowerBound + piece.count,
                // `read` refuses clusters that are missing.
                content: piece.content == .hole ? .zero : .data)
        }
    }

    public func location(at offset: Int64, limit: Int64) async throws -> HostLocation? {
        let first = try await tables.run(at: offset, limit: limit)
        guard case .standard(let host) = first.mapping, host.bytes < storage.size else {
            return nil
        }
        var end = first.range.upperBound
        while end < limit {
            let next = try await tables.run(at: end, limit: limit)
            guard case .standard(let nextHost) = next.mapping, nextHost == host + (end - offset)
            else { break }
            end = next.range.upperBound
        }
        // What lies beyond the end of the file reads as zeros and has to be made up.
        let range = host.bytes..<min(host.bytes + end - offset, storage.size)
        return HostLocation(holder: storage, range: range)
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let end = offset + Int64(buffer.byteCount)
        var position = offset
        while position < end {
            let run = try await tables.run(at: position, limit: end)
            let place = Int(run.range.lowerBound - offset)..<Int(run.range.upperBound - offset)
            switch run.mapping {
            case .unallocated, .zero: buffer.zeroFill(place)
            case .standard(let host):
                var part = buffer.slice(place)
                try await readStandard(into: &part, at: host, guest: position)
            case .compressed(let cluster):
                let batch = try await compressedBatch(from: run, cluster, limit: end)
                try await readCompressed(batch, into: &buffer, bufferStart: offset)
                position = batch.range.upperBound
                continue
            }
            position = run.range.upperBound
        }
    }

    /// The part of the last cluster that the file lacks reads as zeros: qemu extends files
    /// lazily.
    ///
    /// - Throws: `ImageError` where a whole cluster is missing. None of qemu's ways to make an
    ///   image leaves one behind the end, so the file was cut.
    private func readStandard(
        into buffer: inout MutableRawSpan, at host: HostOffset, guest: Int64
    ) async throws {
        let end = host.bytes + Int64(buffer.byteCount)
        if end > storage.size {
            let cluster = host.bytes.roundedDown(to: readGranularity)
            let missing = max(cluster, storage.size.roundedUp(to: readGranularity))
            if missing < end { throw isMissing("data", at: missing, guest + missing - host.bytes) }
        }
        let available = Int(max(0, min(Int64(buffer.byteCount), storage.size - host.bytes)))
        if available > 0 {
            var part = buffer.slice(0..<available)
            try await storage.read(into: &part, at: host.bytes)
        }
        buffer.zeroFill(available..<buffer.byteCount)
    }

    private func isMissing(_ kind: String, at host: Int64, _ guest: Int64) -> ImageError {
        .corrupt(
            storage.name,
            "the \(kind) cluster of guest offset \(guest.roundedDown(to: readGranularity)) at offset "
                + "\(host) lies beyond the end of the file (\(storage.size) bytes): the image is cut "
                + "short or damaged")
    }
}

// Compressed clusters: neighbours in the host are read by one call.
extension Qcow2Source {
    private struct Batch {
        /// On the guest disk, in bytes.
        var range: Range<Int64>
        /// What to read of the file.
        var host: Range<Int64>
        /// Each cluster with the part of it that is wanted.
        var clusters: [(wanted: Range<Int64>, cluster: Qcow2CompressedCluster)]
    }

    /// Larger batches save nothing more and cost every worker memory, in bytes.
    private static var maximumBatch: Int64 { 64 << 10 }

    private func compressedBatch(
        from run: Qcow2Run, _ cluster: Qcow2CompressedCluster, limit: Int64
    ) async throws -> Batch {
        var batch = Batch(
            range: run.range, host: try hostRange(cluster, run.range.lowerBound),
            clusters: [(run.range, cluster)])
        while batch.range.upperBound < limit {
            let next = try await tables.run(at: batch.range.upperBound, limit: limit)
            guard case .compressed(let cluster) = next.mapping else { break }
            let host = try hostRange(cluster, next.range.lowerBound)
            // Streams share sectors, so the counted ends of neighbours overlap.
            guard host.lowerBound >= batch.host.lowerBound,
                host.lowerBound <= batch.host.upperBound,
                host.upperBound - batch.host.lowerBound <= Self.maximumBatch
            else { break }
            batch.host = batch.host.lowerBound..<max(batch.host.upperBound, host.upperBound)
            batch.range = batch.range.lowerBound..<next.range.upperBound
            batch.clusters.append((next.range, cluster))
        }
        return batch
    }

    /// Where a stream may lie, cut at the end of the file: the last one may end there.
    private func hostRange(
        _ cluster: Qcow2CompressedCluster, _ guest: Int64
    ) throws(ImageError) -> Range<Int64> {
        let start = cluster.host.bytes
        guard start < storage.size else { throw isMissing("compressed", at: start, guest) }
        return start..<min(start + cluster.maximumLength, storage.size)
    }

    private func readCompressed(
        _ batch: Batch, into buffer: inout MutableRawSpan, bufferStart: Int64
    ) async throws {
        // Reused: many threads that allocate and free odd sizes scatter the heap.
        // A stream that saved nothing is a little longer than its cluster.
        let usual = Int(Self.maximumBatch) + 1024
        let count = batch.host.count
        var input = try inputs.take(
            byteCount: count <= usual ? usual : count.roundedUp(to: 64 << 10))
        var all = input.mutableBytes
        var inputSpan = all.slice(0..<batch.host.count)
        try await storage.read(into: &inputSpan, at: batch.host.lowerBound)

        // Not before: as many as there are threads are enough, for nothing is waited for from here
        // on.
        let decompressor = try decompressors.take()
        defer { decompressors.giveBack(decompressor) }
        for (wanted, cluster) in batch.clusters {
            let host = try hostRange(cluster, wanted.lowerBound)
            let stream = input.bytes.extracting(
                Int(
                    host.lowerBound - batch.host.lowerBound)..<Int(
                        host.upperBound - batch.host.lowerBound))
            let place =
                Int(wanted.lowerBound - bufferStart)..<Int(wanted.upperBound - bufferStart)
            do throws(Qcow2Decompressor.Failure) {
                try decompress(
                    stream, with: decompressor, wanted: wanted, into: &buffer, place: place)
            } catch {
                if error == .noMemory { throw ImageError.outOfMemory() }
                throw ImageError.corrupt(
                    storage.name,
                    "cannot decompress the cluster of guest offset "
                        + "\(wanted.lowerBound.roundedDown(to: readGranularity)) at offset "
                        + "\(cluster.host.bytes): \(error)")
            }
        }
        inputs.giveBack(input)
    }

    private func decompress(
        _ stream: RawSpan, with decompressor: Qcow2Decompressor, wanted: Range<Int64>,
        into buffer: inout MutableRawSpan, place: Range<Int>
    ) throws(Qcow2Decompressor.Failure) {
        let clusterSize = Int(readGranularity)
        if wanted.count == clusterSize {
            var part = buffer.slice(place)
            return try decompressor.decompress(stream, into: &part)
        }
        // Only a part of the cluster is wanted, or the disk ends within it.
        var whole: IOBuffer
        do { whole = try IOBuffer(byteCount: clusterSize) } catch { throw .noMemory }
        var span = whole.mutableBytes
        try decompressor.decompress(stream, into: &span)
        let skipped = Int(wanted.lowerBound % readGranularity)
        let source = whole.bytes.extracting(skipped..<skipped + wanted.count)
        var part = buffer.slice(place)
        part.withUnsafeMutableBytes { destination in
            source.withUnsafeBytes { destination.copyMemory(from: $0) }
        }
    }
}
