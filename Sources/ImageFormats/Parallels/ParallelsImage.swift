import DiskImage
import ImageStorage

/// A Parallels image as a guest disk: one table says where each cluster lies.
struct ParallelsImage: MappedImage {
    let storage: any Storage
    private let header: ParallelsHeader
    /// The block allocation table, as it is stored: numbers of 32 bits, little endian.
    private let table: [UInt8]

    /// Reads the header and the table.
    ///
    /// - Throws: `ImageError` for damaged and cut images.
    init(_ storage: any Storage) async throws {
        let start = try await storage.readBytes(
            at: HostOffset(0), count: min(Int64(ParallelsHeader.length), storage.size), "header")
        header = try ParallelsHeader(start.span.bytes, name: storage.name)
        table = try await storage.readBytes(
            at: HostOffset(Int64(ParallelsHeader.length)), count: header.tableEntries * 4,
            "block allocation table")
        self.storage = storage
        guard !header.isEmpty || table.allSatisfy({ $0 == 0 }) else {
            throw ImageError.corrupt(
                storage.name, "the image is marked as empty, and its table names clusters")
        }
    }

    var virtualSize: Int64 { header.virtualSize }
    var readGranularity: Int64 { 1 }

    func run(at offset: Int64, limit: Int64) throws(ImageError) -> StoredRun {
        let clusterSize = header.clusterSize
        var cluster = offset / clusterSize
        let start = cluster * clusterSize
        let first = try host(of: cluster)
        var end = start + clusterSize
        while end < limit {
            cluster += 1
            let next = try host(of: cluster)
            guard next == first.map({ $0 + end - start }) else { break }
            end += clusterSize
        }
        return StoredRun(
            range: offset..<min(end, limit), content: first == nil ? .unallocated : .data,
            hostOffset: first.map { $0 + offset - start })
    }

    /// Where a cluster lies, in bytes; nil if it lies nowhere, or is behind the end of the table.
    private func host(of cluster: Int64) throws(ImageError) -> Int64? {
        guard cluster < header.tableEntries else { return nil }
        let entry = table.span.bytes.unsafeLoadUnaligned(
            fromByteOffset: Int(cluster) * 4, as: UInt32.self)
        guard entry != 0 else { return nil }
        let (place, overflow) = Int64(UInt32(littleEndian: entry))
            .multipliedReportingOverflow(by: header.entryUnit)
        guard !overflow, (header.dataStart..<max(header.dataStart, storage.size)).contains(place)
        else {
            throw .corrupt(
                storage.name,
                "the cluster of guest offset \(cluster * header.clusterSize) lies at "
                    + "\(UInt32(littleEndian: entry)) x \(header.entryUnit) bytes: no place for it "
                    + "in a file of \(storage.size) bytes")
        }
        return place
    }
}
