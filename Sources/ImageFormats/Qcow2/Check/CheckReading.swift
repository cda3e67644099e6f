import Concurrency
import DiskImage
import Glibc
import ImageStorage

extension Qcow2Entry {
    /// Where a refcount block is, in an entry of the refcount table.
    static let refcountBlockMask: UInt64 = 0xffff_ffff_ffff_fe00
}

extension ImageError {
    /// A check that could not be brought to an end, in the words that qemu-img has for it.
    static func checkFailed(_ code: Int32) -> ImageError {
        ImageError(.system(errno: code), "Check failed: \(String(cString: strerror(code)))")
    }
}

extension Storage {
    /// Fills a buffer; what would lie beyond the end of the file is zeros.
    ///
    /// - Returns: how many bytes were there, 0 for none.
    func readAvailable(into buffer: inout IOBuffer, at offset: Int64) async throws -> Int {
        let count = buffer.byteCount
        let available = offset < size ? Int(min(Int64(count), size - offset)) : 0
        var span = buffer.mutableBytes
        if available > 0 {
            var part = span.slice(0..<available)
            try await read(into: &part, at: offset)
        }
        if available < count { span.zeroFill(available..<count) }
        return available
    }

    /// Reads a table of big-endian numbers as far as the file has it.
    func readWords(at offset: Int64, count: Int64) async throws -> [UInt64] {
        let there = max(0, min(count, (size - offset).dividedUp(by: 8)))
        guard there > 0 else { return [] }
        try MemoryMargin.check(for: 2 * Int(there) * 8)
        var buffer = try IOBuffer(byteCount: Int(there) * 8)
        _ = try await readAvailable(into: &buffer, at: offset)
        let bytes = buffer.bytes
        return bytes.bigEndianWords()
    }
}

/// The entries of an L1 table that name an L2 table, some at a time: few at first, and one by one
/// where reading waits.
struct L1Batches: Sequence, IteratorProtocol {
    private let entries: [UInt64]
    private let tablesPerBatch: Int
    private let meter: CallMeter
    private var position = 0
    private var size = 1

    init(_ entries: [UInt64], tablesPerBatch: Int, meter: CallMeter) {
        self.entries = entries
        self.tablesPerBatch = tablesPerBatch
        self.meter = meter
    }

    mutating func next() -> [UInt64]? {
        let size = meter.isWaiting ? 1 : size
        self.size = Swift.min(2 * self.size, tablesPerBatch)
        var batch: [UInt64] = []
        while position < entries.count, batch.count < size {
            if entries[position] != 0 { batch.append(entries[position]) }
            position += 1
        }
        return batch.isEmpty ? nil : batch
    }
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
