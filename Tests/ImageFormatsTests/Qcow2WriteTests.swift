import DiskImage
import ImageStorage
import MemoryImages
import Testing

@testable import ImageFormats

@Suite struct Qcow2WriteTests {
    /// Writes an image cluster by cluster, as the pipeline does but alone.
    func write(
        _ guest: [UInt8], _ options: Qcow2Options, compress: Bool = false, minSparse: Int = 4096
    ) async throws -> MemoryStorage {
        let storage = MemoryStorage()
        let target = try Qcow2Target(
            storage: storage, virtualSize: Int64(guest.count), options: options,
            compress: compress, minSparse: minSparse)
        let size = Int(options.clusterSize)
        var data = try IOBuffer(byteCount: size)
        var encoded = try IOBuffer(byteCount: size)
        for start in stride(from: 0, to: guest.count, by: size) {
            let piece = guest[start..<min(start + size, guest.count)]
            var span = data.mutableBytes
            span.zeroFill()
            span.withUnsafeMutableBytes { $0.copyBytes(from: piece) }
            var room = encoded.mutableBytes
            var used = 0
            let pieces = try target.encode(
                data.bytes, positions: 0..<piece.count, at: Int64(start), into: &room, used: &used)
            try await target.write(
                try target.place(pieces, encoded: encoded.bytes), data: data.bytes, origin: .nowhere
            )
        }
        try await target.finish(virtualSize: Int64(guest.count))
        return storage
    }

    /// Bytes of which a part is zero, a part compresses and a part does not.
    private func guest(clusters: Int, clusterSize: Int, seed: UInt64) -> [UInt8] {
        var random = SplitMix(seed: seed)
        var bytes: [UInt8] = []
        for _ in 0..<clusters {
            switch random.next() % 4 {
            case 0: bytes += [UInt8](repeating: 0, count: clusterSize)
            case 1: bytes += (0..<clusterSize).map { _ in UInt8(truncatingIfNeeded: random.next()) }
            default:
                let text = (0..<16).map { _ in UInt8(truncatingIfNeeded: random.next()) }
                bytes += (0..<clusterSize).map { text[$0 / 7 % 16] }
            }
        }
        return bytes
    }

    @Test(arguments: [9, 12, 16], [false, true])
    func refcountsAreExact(clusterBits: Int, compress: Bool) async throws {
        for version in [2, 3] {
            for compression in Qcow2Compression.allCases where version == 3 || compression == .zlib
            {
                var options = Qcow2Options()
                options.clusterSize = 1 << Int64(clusterBits)
                options.version = version
                options.compression = compression
                // With 512-byte clusters: many L2 tables and refcount blocks.
                let bytes = guest(clusters: 900, clusterSize: 1 << clusterBits, seed: 7)
                    .dropLast(511)
                let storage = try await write(Array(bytes), options, compress: compress)
                ImageChecker(bytes: storage.bytes).check()
                let source = try await Qcow2Source(MemoryStorage(storage.bytes))
                #expect(source.header.version == version)
                let readBack = try await readAll(source)
                #expect(readBack == Array(bytes))
            }
        }
    }

    /// The tail of an image crosses from one refcount block to the next at every possible place.
    @Test func everyNumberOfClustersIsCounted() async throws {
        var options = Qcow2Options()
        options.clusterSize = 512
        for clusters in 230...262 {
            let bytes = [UInt8](repeating: 1, count: clusters * 512)
            let storage = try await write(bytes, options)
            ImageChecker(bytes: storage.bytes).check()
            let readBack = try await readAll(Qcow2Source(MemoryStorage(storage.bytes)))
            #expect(readBack == bytes)
        }
    }

    @Test func emptyDiskHasTablesOnly() async throws {
        let storage = try await write([], Qcow2Options())
        ImageChecker(bytes: storage.bytes).check()
        let source = try await Qcow2Source(MemoryStorage(storage.bytes))
        #expect(source.virtualSize == 0)
    }

    @Test func storesZerosWhenTold() async throws {
        let bytes = [UInt8](repeating: 0, count: 3 << 16)
        let sparse = try await write(bytes, Qcow2Options())
        let full = try await write(bytes, Qcow2Options(), minSparse: 0)
        #expect(full.size - sparse.size == 4 << 16)  // three clusters and an L2 table
        let found = try await Qcow2Source(MemoryStorage(full.bytes)).mappings(
            at: 0, limit: 3 << 16, holes: .thorough)
        #expect(found.map(\.range) == [0..<3 << 16] && found[0].content == .data)
    }

    /// A host cluster can be shared by more streams than a 16-bit refcount can count.
    @Test func refcountsDoNotOverflow() async throws {
        let storage = MemoryStorage()
        var options = Qcow2Options()
        options.clusterSize = 2 << 20
        let target = try Qcow2Target(
            storage: storage, virtualSize: 70_000 << 21, options: options, compress: true,
            minSparse: 4096)
        let stream = [UInt8](1...20)
        for index in 0..<Int64(70_000) {
            let placement = try target.place(
                [
                    EncodedPiece(
                        guestRange: index << 21..<(index + 1) << 21, form: .compressed(0..<20))
                ], encoded: stream.span.bytes)
            try await target.write(placement, data: RawSpan(), origin: .nowhere)
        }
        try await target.finish(virtualSize: 70_000 << 21)
        let bytes = storage.bytes
        ImageChecker(bytes: bytes).check()
        // 65535 of them in the first cluster behind header, refcounts and L2 table, the others in
        // the next.
        for (cluster, count) in [(3, 65535), (4, 70_000 - 65535)] {
            let streams = bytes[cluster << 21..<(cluster << 21) + count * 20]
            let areThere = streams.elementsEqual((0..<count).lazy.flatMap { _ in stream })
            #expect(areThere)
            #expect(bytes[(cluster << 21) + count * 20] == 0)
        }
    }

    @Test(arguments: [256, 3 << 10, 4 << 20, 0, -512])
    func refusesClusterSizes(size: Int64) {
        var options = Qcow2Options()
        options.clusterSize = size
        #expect(throws: ImageError.self) {
            try Qcow2Target(
                storage: MemoryStorage(), virtualSize: 1 << 20, options: options, compress: false,
                minSparse: 0)
        }
    }

    @Test func refusesWhatItsTablesCannotHold() {
        var options = Qcow2Options()
        options.clusterSize = 512
        #expect(throws: ImageError.self) {
            try Qcow2Target(
                storage: MemoryStorage(), virtualSize: 1 << 40, options: options, compress: false,
                minSparse: 0)
        }
    }
}

/// Sebastiano Vigna's SplitMix64 (public domain): the same numbers from the same seed.
struct SplitMix {
    private var state: UInt64
    init(seed: UInt64) { state = seed }

    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var mixed = state
        mixed = (mixed ^ mixed >> 30) &* 0xbf58_476d_1ce4_e5b9
        mixed = (mixed ^ mixed >> 27) &* 0x94d0_49bb_1331_11eb
        return mixed ^ mixed >> 31
    }
}
