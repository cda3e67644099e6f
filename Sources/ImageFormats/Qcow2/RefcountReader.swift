import DiskImage
import ImageStorage

/// The refcounts of a file: a table with the places of refcount blocks.
///
/// Source: QEMU's docs/interop/qcow2.txt, section "Host cluster management".
struct RefcountReader: Sendable {
    /// The place of a block in an entry of the table, a byte offset. The other bits are reserved.
    static let offsetMask: UInt64 = 0xffff_ffff_ffff_fe00

    let storage: any Storage
    /// Size of a cluster in bytes.
    let clusterSize: Int64
    /// Width of a refcount in bits.
    let bits: Int
    var table: [UInt64] = []

    init(_ storage: any Storage, _ header: Qcow2Header) {
        self.storage = storage
        clusterSize = header.geometry.clusterSize
        bits = header.refcountBits
    }

    /// Reads the table as far as the file has it.
    ///
    /// - Parameter clusters: entries for more clusters are not needed.
    init(
        reading storage: any Storage, _ header: Qcow2Header, clusters: Int64 = .max
    ) async throws {
        self.init(storage, header)
        // A header can name any length, and the file can be a hole; qemu opens no longer table.
        let bytes = min(
            header.refcountTableClusters * clusterSize, Qcow2Layout.maximumRefcountTable)
        table = try await storage.readWords(
            at: max(0, header.refcountTableOffset.bytes),
            count: min(clusters.dividedUp(by: Int64(clustersPerBlock)), bytes / 8))
    }

    var clustersPerBlock: Int { RefcountBlock.count(bits: bits, byteCount: Int(clusterSize)) }

    /// Offset of a block in bytes; 0 if there is none.
    func blockOffset(_ index: Int) -> UInt64 {
        index < table.count ? table[index] & Self.offsetMask : 0
    }

    /// Reads a block.
    ///
    /// - Returns: nil if the table names an unaligned place; an empty block if it names none, or
    ///   one behind the end of the file. A block that the file ends in is filled up with zeros.
    func block(_ index: Int) async throws -> RefcountBlock? {
        let offset = blockOffset(index)
        guard offset % UInt64(clusterSize) == 0 else { return nil }
        guard offset != 0, offset < UInt64(storage.size) else {
            return RefcountBlock(bits: bits, bytes: [])
        }
        var buffer = try IOBuffer(byteCount: Int(clusterSize))
        _ = try await storage.readAvailable(into: &buffer, at: Int64(offset))
        return RefcountBlock(bits: bits, bytes: buffer.bytes.withUnsafeBytes { Array($0) })
    }
}

/// A cache of refcount blocks, for clusters that mostly lie near each other.
struct RefcountCache {
    var reader: RefcountReader
    /// Blocks by index in the table; nil for an unaligned one.
    var blocks: [Int: RefcountBlock?] = [:]
    private let capacity: Int

    /// Size of the cache in bytes; it holds at least four blocks.
    private static let size = 8 << 20

    init(_ reader: RefcountReader) {
        self.reader = reader
        capacity = max(4, Self.size / Int(reader.clusterSize))
    }

    /// The next block to be loaded displaces all others.
    var isFull: Bool { blocks.count >= capacity }

    mutating func load(_ index: Int) async throws {
        guard blocks[index] == nil else { return }
        if isFull { blocks.removeAll(keepingCapacity: true) }
        blocks[index] = .some(try await reader.block(index))
    }

    /// The refcount of a cluster; nil if its block is at an unaligned place.
    mutating func refcount(of cluster: Int) async throws -> UInt64? {
        let (index, place) = cluster.quotientAndRemainder(dividingBy: reader.clustersPerBlock)
        try await load(index)
        return blocks[index]??[place]
    }
}
