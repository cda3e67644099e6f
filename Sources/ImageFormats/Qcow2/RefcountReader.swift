import DiskImage
import ImageStorage

extension Qcow2Entry {
    /// Where a refcount block is, in an entry of the refcount table.
    static let refcountBlockMask: UInt64 = 0xffff_ffff_ffff_fe00
}

/// The refcounts as they are in the file.
struct RefcountReader: Sendable {
    let storage: any Storage
    let table: [UInt64]
    let codec: RefcountCodec
    let clusterSize: Int64

    var blockEntries: Int { codec.entries(inBytes: clusterSize) }

    /// 0 where there is no block.
    func blockOffset(_ index: Int) -> UInt64 {
        index < table.count ? table[index] & Qcow2Entry.refcountBlockMask : 0
    }

    /// - Returns: false if there is no block, or none in the file: all its refcounts are 0.
    func readBlock(_ index: Int, into buffer: inout IOBuffer) async throws -> Bool {
        let offset = blockOffset(index)
        guard offset != 0, offset < UInt64(storage.size) else { return false }
        return try await storage.readAvailable(into: &buffer, at: Int64(offset)) > 0
    }
}

/// Single refcounts, of clusters that mostly lie near each other.
struct RefcountCache {
    private let reader: RefcountReader
    /// Blocks by index; nil for one that is not there or cannot be.
    private var blocks: [Int: Block] = [:]
    private let capacity: Int

    private enum Block {
        case missing
        case unaligned
        case bytes([UInt8])
    }

    /// What the cache may hold, in bytes.
    private static let size = 8 << 20

    init(_ reader: RefcountReader) {
        self.reader = reader
        capacity = max(2, Self.size / Int(reader.clusterSize))
    }

    /// nil if the block cannot be read where the table says it is.
    mutating func refcount(of cluster: Int) async throws -> UInt64? {
        let index = cluster / reader.blockEntries
        if blocks[index] == nil {
            if blocks.count >= capacity { blocks.removeAll(keepingCapacity: true) }
            blocks[index] = try await read(index)
        }
        switch blocks[index] {
        case .unaligned: return nil
        case .missing, nil: return 0
        case .bytes(let bytes):
            return reader.codec.read(bytes.span.bytes, cluster % reader.blockEntries)
        }
    }

    private func read(_ index: Int) async throws -> Block {
        guard reader.blockOffset(index) % UInt64(reader.clusterSize) == 0 else {
            return .unaligned
        }
        var buffer = try IOBuffer(byteCount: Int(reader.clusterSize))
        guard try await reader.readBlock(index, into: &buffer) else { return .missing }
        return .bytes(buffer.bytes.withUnsafeBytes { Array($0) })
    }
}
