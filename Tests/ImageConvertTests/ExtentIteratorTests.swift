import DiskImage
import MemoryImages
import Testing

@testable import ImageConvert

@Suite struct ExtentIteratorTests {
    /// Chunks as text: `start:` and each segment as c or z with its range in blocks.
    private func chunks(
        _ sketch: String, blockSize: Int64 = 4, target: TargetTraits, storesZeros: Bool = false,
        granularity: Int64 = 4, chunkSize: Int64 = 16, gridStart: Int64 = 0
    ) async throws -> String {
        let iterator = ExtentIterator(
            source: SketchSource(sketch, blockSize: blockSize),
            policy: CopyPolicy(target: target, storesZeros: storesZeros),
            granularity: granularity, chunkSize: chunkSize,
            gridStart: gridStart)
        var result: [String] = []
        while let chunk = try await iterator.next() {
            #expect(chunk.sequence == result.count)
            let segments = chunk.segments.map { segment in
                for bound in [segment.range.lowerBound, segment.range.upperBound] {
                    #expect(bound % granularity == 0)
                }
                if segment.action == .copy {
                    #expect(segment.range.lowerBound >= chunk.start)
                    #expect(segment.range.upperBound <= chunk.start + max(chunkSize, 4096))
                }
                let name = segment.action == .copy ? "c" : "z"
                return "\(name)\(segment.range.lowerBound)-\(segment.range.upperBound)"
            }
            result.append(segments.joined(separator: ","))
        }
        return result.joined(separator: " ")
    }

    private static func traits(zeroFrom: Int64, backing: Bool = false) -> TargetTraits {
        TargetTraits(
            granularity: 4, readsAsZeroFrom: zeroFrom, hasBacking: backing, placesInOrder: true)
    }

    @Test(arguments: [
        // one cell of 4 blocks, joined
        ("AAAA", "c0-16"), ("AAAAAA", "c0-16 c16-24"),
        // holes inside a cell cut it into segments
        ("A0BA", "c0-4,c8-16"), ("A-BA", "c0-4,c8-16"),
        // cells of zeros only have no chunk
        ("A0000000000B", "c0-4 c44-48"), ("00000000", ""), ("", ""),
    ])
    func skipsZerosOnAFreshTarget(sketch: String, expected: String) async throws {
        #expect(try await chunks(sketch, target: Self.traits(zeroFrom: 0)) == expected)
    }

    @Test(arguments: [
        ("A0BA", "c0-4,z4-8,c8-16"), ("0000000000AA", "z0-40,c40-48"),
        ("A00000000000000B", "c0-4,z4-16 z16-60,c60-64"),
    ])
    func zeroesWhatDoesNotReadAsZero(sketch: String, expected: String) async throws {
        #expect(try await chunks(sketch, target: Self.traits(zeroFrom: .max)) == expected)
    }

    @Test(arguments: [
        // one block into the disk
        ("AAAAAAAAAAAA", "c0-4 c4-20 c20-36 c36-48"), ("0000000AAAAA", "c28-36 c36-48"),
        // compressed blocks are cut as others are, and with them
        ("AAaaAAAA", "c0-4 c4-20 c20-32"), ("a0AAAA", "c0-4 c8-20 c20-24"),
    ])
    func theGridBeginsWithinTheDisk(sketch: String, expected: String) async throws {
        let found = try await chunks(sketch, target: Self.traits(zeroFrom: 0), gridStart: 4)
        #expect(found == expected)
    }

    @Test func knowsWhatHasToBeDecompressed() async throws {
        let source = SketchSource("AAAAAAaaA000a000000a", blockSize: 4)
        let iterator = ExtentIterator(
            source: source,
            policy: CopyPolicy(target: Self.traits(zeroFrom: 0), storesZeros: false),
            granularity: 4,
            chunkSize: 16)
        var found: [Bool] = []
        while let chunk = try await iterator.next() { found.append(chunk.isCompressed) }
        #expect(found == [false, true, false, true, true])
    }

    @Test func joinsLongZeros() async throws {
        // One extent of 4 GiB of zeros comes in pieces of 1 GiB, not of a cell.
        let result = try await chunks(
            "0000", blockSize: 1 << 30, target: Self.traits(zeroFrom: .max), chunkSize: 1 << 20)
        #expect(result.split(separator: " ").count == 4)
    }

    @Test(arguments: [
        // granularity of two blocks: a unit with any data is copied whole
        ("A000", "c0-8"), ("0A0000AA", "c0-8 c24-32"), ("0000", ""),
    ])
    func keepsToTheGranularity(sketch: String, expected: String) async throws {
        let traits = TargetTraits(granularity: 8, readsAsZeroFrom: 0, placesInOrder: true)
        #expect(try await chunks(sketch, target: traits, granularity: 8) == expected)
    }

    @Test func readsWholeUnitsAboveABackingFile() async throws {
        // In units of two blocks: all backing is left out, a mixture is read, zeros are zeroed
        // where the backing file (4 blocks) reaches and left out behind it.
        let traits = TargetTraits(
            granularity: 8, readsAsZeroFrom: 16, hasBacking: true, placesInOrder: true)
        #expect(try await chunks("--A-00-0", target: traits, granularity: 8) == "c8-16")
        #expect(try await chunks("00-0--A-", target: traits, granularity: 8) == "z0-8,c8-16 c24-32")
    }

    @Test func storesZerosWhenTold() async throws {
        let target = Self.traits(zeroFrom: 0)
        #expect(try await chunks("A00B", target: target, storesZeros: true) == "c0-16")
    }

    @Test func endsWithinAUnit() async throws {
        let iterator = ExtentIterator(
            source: SketchSource("AAAAA", blockSize: 1),
            policy: CopyPolicy(target: Self.traits(zeroFrom: 0), storesZeros: false),
            granularity: 4, chunkSize: 4)
        #expect(try await iterator.next()?.segments.map(\.range) == [0..<4])
        #expect(try await iterator.next()?.segments.map(\.range) == [4..<5])
        #expect(try await iterator.next() == nil)
    }

    /// Many callers, and a source that lets others in between: each chunk once, numbered in order.
    @Test func servesManyCallersInOrder() async throws {
        let iterator = ExtentIterator(
            source: SketchSource(String(repeating: "A0", count: 500), blockSize: 4, pause: true),
            policy: CopyPolicy(target: Self.traits(zeroFrom: 0), storesZeros: false),
            granularity: 4, chunkSize: 4)
        let all = try await withThrowingTaskGroup(of: [Chunk].self) { group in
            for _ in 0..<8 {
                group.addTask {
                    var mine: [Chunk] = []
                    while let chunk = try await iterator.next() { mine.append(chunk) }
                    #expect(mine.map(\.sequence) == mine.map(\.sequence).sorted())
                    return mine
                }
            }
            return try await group.reduce(into: []) { $0 += $1 }
        }
        let sorted = all.sorted { $0.sequence < $1.sequence }
        #expect(sorted.map(\.sequence) == Array(0..<500))
        #expect(sorted.map { $0.segments[0].range.lowerBound } == (0..<500).map { Int64($0) * 8 })
    }

    /// A mixed unit behind shared data is looked at twice, and copied.
    @Test func aMixedUnitFollowsOnShares() async throws {
        let iterator = ExtentIterator(
            source: SketchSource("A0", blockSize: 6),
            policy: CopyPolicy(target: Self.traits(zeroFrom: 0), storesZeros: false),
            granularity: 4, chunkSize: 8, sharesUnread: { true })
        let shared = try #require(try await iterator.next())
        #expect(shared.isShared && shared.segments.map(\.range) == [0..<4])
        await iterator.takeBack([])
        let copied = try #require(try await iterator.next())
        #expect(copied.segments.map(\.range) == [4..<8] && copied.segments[0].action == .copy)
        #expect(copied.mappings.map(\.range) == [4..<6, 6..<8])
    }

    /// Ranges that could not be shared come back, to the next caller: also when the disk's end has
    /// been reached, where the others wait to see whether something is left.
    @Test func whatCouldNotBeSharedIsCopiedByAll() async throws {
        let blocks = Int64(66)
        let iterator = ExtentIterator(
            source: SketchSource(String(repeating: "A", count: Int(blocks)), blockSize: 4),
            policy: CopyPolicy(target: Self.traits(zeroFrom: 0), storesZeros: false),
            granularity: 4, chunkSize: 8, sharesUnread: { true })
        let shared = try #require(try await iterator.next())
        #expect(shared.isShared && shared.segments.map(\.range) == [0..<256])
        let last = try #require(try await iterator.next())
        #expect(last.isShared && last.segments.map(\.range) == [256..<264])
        async let other = iterator.next(upTo: 8)
        await iterator.takeBack([])
        let left = [0..<2, 12..<28] as [Range<Int64>]
        await iterator.takeBack(left.map { Mapping($0, .data) })
        let own = [try await iterator.next(), try await iterator.next(), try await iterator.next()]
        let all = (own + [try await other]).compactMap { $0 }
        let sorted = all.sorted { $0.sequence < $1.sequence }
        #expect(sorted.map(\.sequence) == [2, 3, 4, 5])
        #expect(sorted.map { $0.segments[0].range } == [0..<2, 12..<16, 16..<24, 24..<28])
        #expect(
            sorted.allSatisfy { $0.mappings.map(\.range) == [$0.segments[0].range] })
        #expect(all.allSatisfy { !$0.isShared })
        #expect(try await iterator.next() == nil)
    }
}
