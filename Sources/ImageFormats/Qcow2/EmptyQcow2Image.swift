import DiskImage
import ImageStorage

/// A new image that holds nothing, laid out as qemu's:
///
///     header | refcount table | refcount blocks | L1 table | LUKS header
///
/// The file ends with the last entry of the L1 table if no LUKS header follows.
struct EmptyQcow2Image {
    private let storage: any WritableStorage
    /// The data file; nil if the image is to hold the data itself.
    private let data: (any WritableStorage)?
    private let options: Qcow2Options

    /// - Parameter options: options that place nothing ahead of the data.
    init(
        on storage: any WritableStorage, data: (any WritableStorage)?, _ options: Qcow2Options
    ) {
        self.storage = storage
        self.data = data
        self.options = options
    }

    /// - Parameter virtualSize: size of the disk in bytes.
    /// - Throws: `ImageError` if the options contradict each other or the size, or if a write
    ///   fails.
    func write(virtualSize: Int64) async throws {
        let geometry = try options.geometry(virtualSize: virtualSize)
        let clusterSize = geometry.clusterSize
        var header = Qcow2Header(options, geometry)
        // Names that do not fit cause an error before anything is written.
        _ = try header.serialized()
        try await storage.invalidateOldHeader(clusterSize)

        let l1Length = geometry.l1Entries * 8
        let l1Clusters = l1Length.dividedUp(by: clusterSize)
        let luksClusters = (options.encryption?.length ?? 0).dividedUp(by: clusterSize)
        let others = 1 + l1Clusters + luksClusters
        let refcounts = RefcountMetadataSize(
            counting: others, clusterSize: clusterSize, refcountBits: options.refcountBits)
        let firstBlock = 1 + refcounts.tableClusters
        let l1 = (1 + refcounts.total) * clusterSize
        header.refcountTableOffset = HostOffset(clusterSize)
        header.refcountTableClusters = refcounts.tableClusters
        header.l1Offset = HostOffset(l1)

        var end = l1 + l1Length
        let blocks = (0..<refcounts.blocks).map { UInt64((firstBlock + $0) * clusterSize) }
        var table = blocks.bigEndianBytes
        table.appendZeros(upTo: Int(refcounts.tableClusters * clusterSize))
        try await storage.writeBytes(table, at: clusterSize)
        for (index, place) in blocks.enumerated() {
            let block = RefcountBlock(
                bits: options.refcountBits, byteCount: Int(clusterSize), number: Int64(index),
                ofImageWith: others + refcounts.total)
            try await storage.writeBytes(block.bytes, at: Int64(place))
        }
        let luks = l1 + l1Clusters * clusterSize
        if !storage.traits.readsAsZero {
            try await storage.zero(l1..<luks + luksClusters * clusterSize, mayUnmap: true)
        }
        if let volume = options.encryption {
            try await storage.writeBytes(volume.bytes, at: luks)
            header.encryptionHeader = Qcow2Header.TableRange(
                offset: UInt64(luks), length: UInt64(volume.length))
            end = luks + luksClusters * clusterSize
        }
        try await storage.truncate(to: end)
        try await data?.truncate(to: virtualSize)
        try await data?.flush()
        try await storage.flush()
        try await storage.writeBytes(try header.serialized(), at: 0)
    }
}

extension WritableStorage {
    /// Clears the first cluster of a device, so that it no longer looks like the image that it may
    /// hold. An empty file needs nothing.
    func invalidateOldHeader(_ clusterSize: Int64) async throws {
        guard traits.isDevice else { return }
        let zeros = try IOBuffer.zeros(byteCount: Int(min(clusterSize, size)))
        try await write(zeros.bytes, at: 0)
    }
}
