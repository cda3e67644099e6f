import DiskImage
import ImageStorage
import MemoryImages
import Testing

@testable import ImageFormats

@Suite struct Qcow2ReadTests {
    private func decoder(
        version: Int = 3, extended: Bool = false, clusterBits: Int = 16
    ) -> Qcow2EntryDecoder {
        Qcow2EntryDecoder(
            name: "test", version: version,
            geometry: Qcow2Geometry(
                clusterBits: clusterBits, hasExtendedL2: extended, virtualSize: 1 << 40))
    }

    @Test func joinsWhatLiesTogether() throws {
        let size: Int64 = 65536
        let words: [UInt64] = [
            5 << 16 | 1 << 63, 6 << 16 | 1 << 63, 8 << 16, 0, 0, 1, 9 << 16 | 1,
        ]
        let decoder = decoder()
        func first(_ offset: Int64, limit: Int64 = 1 << 30) throws -> Mapping {
            try decoder.mappings(in: words, startingAt: 0, from: offset, limit: limit)[0]
        }
        #expect(try first(100) == Mapping(100..<2 * size, .data, hostOffset: 5 * size + 100))
        #expect(try first(100, limit: 200).range == 100..<200)
        #expect(
            try first(2 * size) == Mapping(2 * size..<3 * size, .data, hostOffset: 8 * size))
        #expect(try first(3 * size) == Mapping(3 * size..<5 * size, .unallocated))
        #expect(try first(5 * size + 1) == Mapping(5 * size + 1..<6 * size, .zero))
        // Zeros with a place of their own are apart.
        #expect(try first(6 * size) == Mapping(6 * size..<7 * size, .zero, hostOffset: 9 * size))
        let all = try decoder.mappings(in: words, startingAt: 0, from: 0, limit: 1 << 30)
        #expect(all.map(\.range.lowerBound) == [0, 2, 3, 5, 6].map { $0 * size })
        #expect(all.last?.range.upperBound == 7 * size)
    }

    @Test func readsSubclusters() throws {
        // Cluster of 64 KiB, subclusters of 2 KiB: 0 allocated, 1 zero, 2 and 3 nothing, 4
        // allocated.
        let words: [UInt64] = [7 << 16, 0b10001 | 0b10 << 32]
        let decoder = decoder(extended: true)
        let all = try decoder.mappings(in: words, startingAt: 0, from: 0, limit: 10240)
        let host: Int64 = 7 << 16
        #expect(
            all == [
                Mapping(0..<2048, .data, hostOffset: host),
                Mapping(2048..<4096, .zero, hostOffset: host + 2048),
                Mapping(4096..<8192, .unallocated, hostOffset: host + 4096),
                Mapping(8192..<10240, .data, hostOffset: host + 8192),
            ])
    }

    /// In a data file each cluster lies at its guest offset, the first one at 0.
    @Test(arguments: [false, true])
    func readsEntriesOfADataFile(extended: Bool) throws {
        var reader = decoder(extended: extended)
        reader.hasDataFile = true
        let (size, copied): (Int64, UInt64) = (65536, 1 << 63)
        func mappings(_ words: [UInt64], _ bitmap: UInt64 = 0xffff_ffff) throws -> [Mapping] {
            let all = extended ? words.flatMap { [$0, $0 == 0 ? 0 : bitmap] } : words
            return try reader.mappings(
                in: all, startingAt: 0, from: 0, limit: Int64(words.count) * size)
        }
        #expect(
            try mappings([copied, 1 << 16 | copied, 0]) == [
                Mapping(0..<2 * size, .data, hostOffset: 0),
                Mapping(2 * size..<3 * size, .unallocated),
            ])
        #expect(
            try mappings([0, 1 << 16 | copied]) == [
                Mapping(0..<size, .unallocated), Mapping(size..<2 * size, .data, hostOffset: size),
            ])
        for wrong in [1 << 16 | copied, 1 << 62, 1 << 62 | copied] {
            #expect(throws: ImageError.self) { try mappings([wrong], 0) }
        }
        // Only the cluster before the wrong one is known.
        #expect(try mappings([copied, copied]) == [Mapping(0..<size, .data, hostOffset: 0)])
        guard !extended else { return }
        #expect(
            try mappings([1, 1 << 16 | copied | 1, 1]) == [
                Mapping(0..<size, .zero), Mapping(size..<2 * size, .zero, hostOffset: size),
                Mapping(2 * size..<3 * size, .zero),
            ])
    }

    @Test func readsCompressedEntries() throws {
        // 54 bits of offset for 64 KiB clusters; 3 further sectors.
        let entry: UInt64 = 1 << 62 | 3 << 54 | 0x12345
        let found = try decoder().mappings(in: [entry], startingAt: 0, from: 0, limit: 1 << 16)
        #expect(found.map(\.content) == [.compressed])
        #expect(found[0].host?.lowerBound == 0x12345)
        #expect(found[0].host?.count == 4 * 512 - 0x145)
    }

    /// A neighbour with the same stream is a cluster of its own.
    @Test(arguments: [false, true]) func aStreamIsOneCluster(_ extended: Bool) throws {
        let entry: UInt64 = 1 << 62 | 3 << 54 | 0x12345
        let words = extended ? [entry, 0, entry, 0] : [entry, entry]
        let decoder = decoder(extended: extended)
        for (start, end) in [(0, 65536), (70_000, 131_072)] as [(Int64, Int64)] {
            let found = try decoder.mappings(
                in: words, startingAt: 0, from: start, limit: 1 << 20)
            #expect(found[0].range == start..<end)
        }
    }

    /// Damage further on ends an answer, so that the part before it can be used.
    @Test(arguments: [false, true]) func goodEntriesComeBeforeDamage(_ extended: Bool) throws {
        let entries: [UInt64] = [5 << 16, 6 << 16, 7 << 16 | 1 << 60]
        let words = extended ? entries.flatMap { [$0, 0xffff_ffff] } : entries
        let decoder = decoder(extended: extended)
        let found = try decoder.mappings(in: words, startingAt: 0, from: 0, limit: 1 << 20)
        #expect(found == [Mapping(0..<131_072, .data, hostOffset: 5 << 16)])
        #expect(throws: ImageError.self) {
            _ = try decoder.mappings(in: words, startingAt: 0, from: 131_072, limit: 1 << 20)
        }
    }

    @Test func refusesDamagedEntries() {
        func refuses(_ decoder: Qcow2EntryDecoder, _ words: [UInt64]) {
            #expect(throws: ImageError.self) {
                _ = try decoder.mappings(in: words, startingAt: 0, from: 0, limit: 1 << 14)
            }
        }
        refuses(decoder(), [5 << 16 | 512])  // not aligned
        refuses(decoder(), [5 << 16 | 1 << 60])  // reserved
        refuses(decoder(), [5 << 16 | 2])
        refuses(decoder(version: 2), [1])  // zero flag before version 3
        refuses(decoder(extended: true), [5 << 16, 1 | 1 << 32])  // allocated and zero
        refuses(decoder(extended: true), [0, 1])  // allocated nowhere
        refuses(decoder(extended: true), [1 << 62 | 5 << 16, 1])  // compressed with subclusters
        refuses(decoder(extended: true), [5 << 16 | 1, 1])  // zero flag in an extended entry
    }

    /// Damaged headers and tables are refused or read; they never trap, hang or eat memory.
    @Test func survivesAnyDamage() async throws {
        let storage = MemoryStorage()
        var options = Qcow2Options()
        options.clusterSize = 512
        options.backing = Qcow2Options.Backing(file: "base", format: "raw", virtualSize: 0)
        let target = try Qcow2Target(
            storage: storage, virtualSize: 64 << 10, options: options, compress: false, minSparse: 0
        )
        var data = try IOBuffer(byteCount: 64 << 10)
        var span = data.mutableBytes
        span.zeroFill()
        var room = MutableRawSpan()
        var used = 0
        let pieces = try target.encode(
            data.bytes, positions: 0..<64 << 10, at: 0, into: &room, used: &used)
        try await target.write(
            try target.place(pieces, encoded: RawSpan()), data: data.bytes, origin: .nowhere)
        try await target.finish(virtualSize: 64 << 10)
        let good = storage.bytes
        var random = SplitMix(seed: 2)
        for round in 0..<4000 {
            var bytes = good
            for _ in 0...Int(random.next() % 3) {
                // Mostly the header; sometimes anything, or the file's end.
                let reach = round % 2 == 0 ? 160 : bytes.count
                let position = Int(random.next() % UInt64(reach))
                let values: [UInt8] = [
                    0, 1, 0x7f, 0x80, 0xff, UInt8(truncatingIfNeeded: random.next()),
                ]
                bytes[position] = values[Int(random.next() % 6)]
                if round % 7 == 0 {
                    bytes.removeLast(Int(random.next() % UInt64(bytes.count - 200)))
                }
                if bytes.count < 300 { break }
            }
            do {
                let source = try await Qcow2Source(MemoryStorage(bytes))
                guard source.virtualSize > 0 else { continue }
                var buffer = try IOBuffer(byteCount: Int(min(source.virtualSize, 64 << 10)))
                var span = buffer.mutableBytes
                _ = try await source.mappings(
                    at: 0, limit: source.virtualSize, holes: .thorough)
                try await source.read(into: &span, at: 0)
            } catch is ImageError {
                continue
            }
        }
    }

    @Test func layersShowThrough() async throws {
        let top = SketchSource("A-0-", blockSize: 4)
        let middle = SketchSource("BB-", blockSize: 4)
        let base = SketchSource("CCCC", blockSize: 4)
        let source = LayeredSource(layers: [top, middle, base])
        let bytes = try await readAll(source)
        // Behind the end of the middle layer there is nothing, whatever lies below it.
        #expect(String(decoding: bytes, as: UTF8.self) == "AAAABBBB\0\0\0\0\0\0\0\0")
        let found = try await mappings(of: source)
        #expect(found.map(\.content) == [.data, .data, .zero, .zero])
        // Nothing below the end of the middle layer is asked.
        #expect(found.map(\.layer) == [0, 1, 0, 0])
        let shown = try await mappings(of: LayeredSource(layers: [top, middle], sizeBelow: .max))
        #expect(shown.map(\.content) == [.data, .data, .zero, .unallocated])
        let above = try await mappings(of: LayeredSource(layers: [top], sizeBelow: 14))
        #expect(above.map(\.content) == [.data, .unallocated, .zero, .unallocated, .zero])
        #expect(above.last?.range == 14..<16)
    }

    /// All mappings of a disk. Each begins where the one before ends.
    private func mappings(of source: some ImageSource) async throws -> [Mapping] {
        var walk = MappingWalk(source)
        var all: [Mapping] = []
        while (all.last?.range.upperBound ?? 0) < source.virtualSize {
            let position = all.last?.range.upperBound ?? 0
            all.append(try await walk.mapping(at: position, limit: source.virtualSize))
        }
        return all
    }

    /// A long answer ends somewhere, and the next one goes on there.
    @Test func answersAreCut() async throws {
        let blocks = 3 * Mapping.mostAtOnce
        let top = SketchSource(String(repeating: "A-", count: blocks / 2), blockSize: 4)
        let base = SketchSource(String(repeating: "BC", count: blocks), blockSize: 2)
        let source = LayeredSource(layers: [top, base])
        let first = try await source.mappings(
            at: 0, limit: source.virtualSize, holes: .thorough)
        #expect(first.count < blocks)
        let all = try await mappings(of: source)
        #expect(all.count == blocks / 2 * 3)
        #expect(zip(all, all.dropFirst()).allSatisfy { $0.range.upperBound == $1.range.lowerBound })
        let bytes = try await readAll(source)
        #expect(String(decoding: bytes.prefix(16), as: UTF8.self) == "AAAABBCCAAAABBCC")
    }

    /// Mappings that were found are read by the right layer of a joined disk.
    @Test func readsWhatWasFound() async throws {
        let whole = try ConcatenatedSource([
            SketchSource(String(repeating: "A", count: 128), blockSize: 4),
            LayeredSource(layers: [
                SketchSource("-B", blockSize: 256), SketchSource("C0", blockSize: 256),
            ]),
        ])
        let part = SliceSource(whole, 500..<900)
        let found = try await mappings(of: part)
        #expect(found.map(\.layer) == [0, 0, 0, 2, 1])
        var buffer = try IOBuffer(byteCount: 400)
        var bytes = buffer.mutableBytes
        try await part.read(found[...], into: &bytes)
        let text = String(decoding: buffer.bytes.withUnsafeBytes { Array($0) }, as: UTF8.self)
        #expect(
            text
                == String(repeating: "A", count: 12) + String(repeating: "C", count: 256)
                + String(repeating: "B", count: 132))
    }

    @Test func joinsPaddedSources() async throws {
        let source = try ConcatenatedSource([
            SketchSource("A", blockSize: 1), SketchSource("B", blockSize: 512),
            SketchSource("", blockSize: 1), SketchSource("C", blockSize: 513),
        ])
        #expect(source.virtualSize == 512 + 512 + 1024)
        let bytes = try await readAll(source)
        #expect(bytes[0] == 65 && bytes[1..<512].allSatisfy { $0 == 0 })
        #expect(bytes[512..<1024].allSatisfy { $0 == 66 })
        #expect(bytes[1024..<1537].allSatisfy { $0 == 67 })
        #expect(bytes[1537...].allSatisfy { $0 == 0 })
        let padding = try await source.mappings(at: 1, limit: 2048, holes: .thorough)
        #expect(padding.map(\.range) == [1..<512] && padding[0].content == .zero)
    }
}
