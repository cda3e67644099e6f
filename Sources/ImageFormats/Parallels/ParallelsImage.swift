import DiskImage
import ImageStorage
import Synchronization

/// A Parallels image as a guest disk. One table holds the place of each cluster.
final class ParallelsImage: Image {
    let storage: any Storage
    private let header: ParallelsHeader
    /// The part of the table that was read last.
    private let lastSlice = Mutex<Slice?>(nil)

    /// A part of the block allocation table as stored: 32-bit numbers, little endian.
    private struct Slice {
        /// Indices of the guest clusters whose entries the slice holds.
        var clusters: Range<Int64>
        var bytes: [UInt8]

        func entry(_ cluster: Int64) -> UInt32 {
            UInt32(
                littleEndian: bytes.span.bytes.unsafeLoadUnaligned(
                    fromByteOffset: Int(cluster - clusters.lowerBound) * 4, as: UInt32.self))
        }
    }

    /// Number of entries in a slice. The table is as long as the header says, so it is not read at
    /// once.
    private static let sliceEntries: Int64 = 16384

    /// Reads the header.
    ///
    /// - Throws: `ImageError` for damaged images and images cut short.
    init(_ storage: any Storage) async throws {
        let start = try await storage.readBytes(
            at: HostOffset(0), count: min(Int64(ParallelsHeader.length), storage.size), "header")
        header = try ParallelsHeader(start.span.bytes, name: storage.name)
        self.storage = storage
        guard header.dataStart <= storage.size else {
            throw ImageError.corrupt(
                storage.name,
                "the block allocation table of \(header.tableEntries) entries lies beyond the end "
                    + "of the file (\(storage.size) bytes)")
        }
        if header.isEmpty { try await requireEmptyTable() }
    }

    /// Throws if the table names clusters, which contradicts the mark that the image is empty and
    /// reads as zeros.
    private func requireEmptyTable() async throws {
        var cluster: Int64 = 0
        while cluster < header.tableEntries {
            try Task.checkCancellation()
            let slice = try await slice(of: cluster)
            guard slice.bytes.allSatisfy({ $0 == 0 }) else {
                throw ImageError.corrupt(
                    storage.name, "the image is marked as empty, and its table names clusters")
            }
            cluster = slice.clusters.upperBound
        }
    }

    var virtualSize: Int64 { header.virtualSize }

    func mappings(
        at offset: Int64, limit: Int64, holes: HoleSearch
    ) async throws -> [Mapping] {
        let mapping = try await mapping(at: offset, limit: limit)
        return try await settled([mapping], clusterSize: header.clusterSize, holes)
    }

    /// The clusters from an offset on that follow each other in the file, or that all have no
    /// place.
    private func mapping(at offset: Int64, limit: Int64) async throws -> Mapping {
        let clusterSize = header.clusterSize
        var cluster = offset / clusterSize
        let start = cluster * clusterSize
        guard cluster < header.tableEntries else { return Mapping(offset..<limit, .unallocated) }
        let slice = try await slice(of: cluster)
        let first = try host(of: cluster, in: slice)
        var end = start + clusterSize
        while end < limit, cluster + 1 < slice.clusters.upperBound {
            cluster += 1
            let next = try host(of: cluster, in: slice)
            guard next == first.map({ $0 + end - start }) else { break }
            end += clusterSize
        }
        return Mapping(
            offset..<min(end, limit), first == nil ? .unallocated : .data,
            hostOffset: first.map { $0 + offset - start })
    }

    private func slice(of cluster: Int64) async throws -> Slice {
        if let last = lastSlice.withLock({ $0 }), last.clusters.contains(cluster) { return last }
        let first = cluster.roundedDown(to: Self.sliceEntries)
        let clusters = first..<min(first + Self.sliceEntries, header.tableEntries)
        let slice = Slice(
            clusters: clusters,
            bytes: try await storage.readBytes(
                at: HostOffset(Int64(ParallelsHeader.length) + first * 4),
                count: Int64(clusters.count) * 4, "block allocation table"))
        lastSlice.withLock { $0 = slice }
        return slice
    }

    /// Place of a cluster in the file, in bytes; nil if the cluster has none.
    private func host(of cluster: Int64, in slice: Slice) throws(ImageError) -> Int64? {
        let entry = slice.entry(cluster)
        guard entry != 0 else { return nil }
        let (place, overflow) = Int64(entry).multipliedReportingOverflow(by: header.entryUnit)
        guard !overflow, (header.dataStart..<max(header.dataStart, storage.size)).contains(place)
        else {
            throw .corrupt(
                storage.name,
                "the cluster of guest offset \(cluster * header.clusterSize) lies at \(entry) x "
                    + "\(header.entryUnit) bytes: no place for it in a file of \(storage.size) "
                    + "bytes")
        }
        return place
    }
}
