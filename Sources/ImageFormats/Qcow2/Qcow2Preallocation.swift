import DiskImage
import ImageStorage

/// Whether an image has many clusters that its file has no blocks for.
enum Qcow2Preallocation {
    /// Counts clusters in use until there are clearly more of them than the file has room for. The
    /// limit is qemu's, because its `map` shows by what it finds: a ninth more, or two.
    ///
    /// - Throws: `ImageError` if the refcounts cannot be read.
    static func isLikely(_ source: Qcow2Source) async throws -> Bool {
        let storage = source.storage
        guard let allocated = storage.allocatedSize else { return false }
        let clusterSize = source.header.geometry.clusterSize
        let room = allocated / clusterSize
        let threshold = max(room * 10 / 9, room + 2)
        let end = storage.size.roundedUp(to: guestSectorSize).dividedUp(by: clusterSize)
        var counter = try RefcountCounter(source.header, storage, endCluster: end)
        return try await counter.reaches(threshold)
    }
}

/// Goes through the refcounts of an image, one block in memory at a time.
private struct RefcountCounter: ~Copyable {
    /// Bits 9 to 63 of a refcount table entry.
    private static let offsetMask: UInt64 = ~0x1ff
    private static let tablePiece: Int64 = 64 << 10

    private let storage: any Storage
    private let codec: RefcountCodec
    private let clusterSize: Int64
    private let tableRange: Range<Int64>
    private let endCluster: Int64
    private var count: Int64 = 0
    private var buffer: IOBuffer

    init(
        _ header: Qcow2Header, _ storage: any Storage, endCluster: Int64
    ) throws(ImageError) {
        buffer = try IOBuffer(byteCount: Int(header.geometry.clusterSize))
        self.storage = storage
        self.endCluster = endCluster
        codec = RefcountCodec(bits: header.extras.refcountBits)
        clusterSize = header.geometry.clusterSize
        // The table is no longer than the file, and begins in it: anything else counts nothing.
        let start = min(max(0, header.refcountTableOffset.bytes), storage.size)
        let length = min(header.refcountTableClusters * clusterSize, storage.size - start)
        tableRange = start..<start + length / 8 * 8
    }

    private var refcountsPerBlock: Int64 { Int64(codec.entries(inBytes: clusterSize)) }

    mutating func reaches(_ threshold: Int64) async throws -> Bool {
        var first: Int64 = 0
        var position = tableRange.lowerBound
        while position < tableRange.upperBound, first < endCluster, count < threshold {
            let length = min(Self.tablePiece, tableRange.upperBound - position)
            var table = try IOBuffer(byteCount: Int(length))
            var span = table.mutableBytes
            try await storage.read(into: &span, at: position)
            for index in 0..<Int(length / 8) {
                let entry = table.bytes.bigEndian(at: index * 8, as: UInt64.self)
                guard first < endCluster, count < threshold else { break }
                try await addBlock(entry, clusters: min(refcountsPerBlock, endCluster - first))
                first += refcountsPerBlock
            }
            position += length
        }
        return count >= threshold
    }

    private mutating func addBlock(_ entry: UInt64, clusters: Int64) async throws {
        guard let offset = Int64(exactly: entry & Self.offsetMask), offset != 0,
            offset < storage.size
        else { return }
        let storage = storage
        let length = Int(min(clusterSize, storage.size - offset))
        var whole = buffer.mutableBytes
        var part = whole.slice(0..<length)
        try await storage.read(into: &part, at: offset)
        count += codec.countUsed(in: buffer.bytes.extracting(0..<length), first: Int(clusters))
    }
}
