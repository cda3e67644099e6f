import Concurrency
import DiskImage
import ImageStorage
import MemoryImages
import Synchronization
import Testing

@testable import ImageFormats

@Suite struct StoragePlacementTests {
    /// Remembers which parts of the buffer were written by one call, and what was written besides.
    private final class Recorder: WritableStorage {
        let readMeter = CallMeter()
        let writeMeter = CallMeter()
        enum Call: Equatable {
            case runs([BufferRun])
            case bytes(Int64, count: Int)
            case zeros(Range<Int64>)
            case shared(Int64, count: Int)
        }

        private let log = Mutex<[Call]>([])
        let memory = MemoryStorage()
        let sharesBlocks: Bool

        init(sharesBlocks: Bool = false) { self.sharesBlocks = sharesBlocks }

        func share(
            _ range: Range<Int64>, of holder: any BlockHolder, at offset: Int64
        ) -> Int64 {
            log.withLock { $0.append(.shared(offset, count: range.count)) }
            return Int64(range.count)
        }

        var calls: [Call] { log.withLock { $0 } }
        var name: String { memory.name }
        var traits: StorageTraits { memory.traits }
        var size: Int64 { memory.size }

        func writeRuns(_ runs: [BufferRun], of bytes: RawSpan) async throws {
            log.withLock { $0.append(.runs(runs)) }
            try await memory.writeRuns(runs, of: bytes)
        }

        func write(_ bytes: RawSpan, at offset: Int64) async throws {
            log.withLock { $0.append(.bytes(offset, count: bytes.byteCount)) }
            try await memory.write(bytes, at: offset)
        }

        func zero(_ range: Range<Int64>, mayUnmap: Bool) async throws {
            log.withLock { $0.append(.zeros(range)) }
            try await memory.zero(range, mayUnmap: mayUnmap)
        }

        func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
            try await memory.read(into: &buffer, at: offset)
        }

        func extent(at offset: Int64, limit: Int64) async throws -> Extent {
            try await memory.extent(at: offset, limit: limit)
        }

        func truncate(to size: Int64) async throws { try await memory.truncate(to: size) }
        func requireSpace(_ bytes: Int64) throws {}
        func flush() async throws {}
    }

    private func carryOut(
        _ writes: [(hostOffset: Int64, bytes: Placement.Bytes)], data: [UInt8]
    ) async throws -> Recorder {
        var placement = Placement()
        for write in writes { placement.append(write.bytes, at: write.hostOffset) }
        let recorder = Recorder()
        try await recorder.writePlacement(placement, data: data.span.bytes)
        return recorder
    }

    private static let data = (0..<1000).map { UInt8($0 % 251) }

    /// All that is plain between two other writes goes by one call, neighbours as one run, whatever
    /// comes first and last.
    @Test func whatIsPlainGoesTogether() async throws {
        let recorder = try await carryOut(
            [
                (0, .plain(0..<10)), (10, .plain(30..<40)), (100, .plain(10..<20)),
                (50, .metadata([1, 2, 3])),
                (200, .plain(20..<30)),
                (300, .zeros(5)),
                (400, .metadata([4])),
                (500, .plain(40..<50)), (510, .plain(50..<60)),
            ], data: Self.data)
        #expect(
            recorder.calls == [
                .runs([
                    BufferRun(offset: 0, parts: [0..<10, 30..<40]),
                    BufferRun(offset: 100, parts: [10..<20]),
                ]),
                .bytes(50, count: 3),
                .runs([BufferRun(offset: 200, parts: [20..<30])]),
                .zeros(300..<305),
                .bytes(400, count: 1),
                .runs([BufferRun(offset: 500, parts: [40..<60])]),
            ])
    }

    /// The origin of a buffer of which each piece of this length lies somewhere else.
    private func scattered(_ pieces: Int64) -> BufferOrigin {
        let mappings = (0..<(1 << 30) / pieces).prefix(1000).map { number in
            let start = number * pieces
            return Mapping(start..<start + pieces, .data, hostOffset: start)
        }
        return BufferOrigin(
            layers: [RawSource(MemoryStorage())], mappings: mappings, start: 0)
    }

    /// To share a short piece takes longer than to write it, and what is written goes together.
    @Test func onlyLongPiecesAreShared() async throws {
        let data = [UInt8](repeating: 7, count: 400 << 10)
        let kib = 1 << 10
        func calls(pieces: Int, _ writes: [(Int64, Range<Int>)]) async throws -> [Recorder.Call] {
            var placement = Placement()
            for (offset, positions) in writes { placement.append(.plain(positions), at: offset) }
            let recorder = Recorder(sharesBlocks: true)
            let origin = scattered(Int64(pieces))
            try await recorder.writePlacement(placement, data: data.span.bytes, origin: origin)
            return recorder.calls
        }
        let mixed = try await calls(
            pieces: 1 << 30,
            [
                (0, 0..<4 * kib), (1 << 20, 8 * kib..<12 * kib), (2 << 20, 16 * kib..<144 * kib),
                (3 << 20, 160 * kib..<164 * kib),
            ])
        #expect(
            mixed == [
                .runs([
                    BufferRun(offset: 0, parts: [0..<4 * kib]),
                    BufferRun(offset: 1 << 20, parts: [8 * kib..<12 * kib]),
                ]),
                .shared(2 << 20, count: 128 * kib),
                .runs([BufferRun(offset: 3 << 20, parts: [160 * kib..<164 * kib])]),
            ])
        // Short pieces of the source that are long together are one write.
        #expect(
            try await calls(pieces: 4 * kib, [(0, 0..<400 * kib)]) == [
                .bytes(0, count: 400 * kib)
            ])
        let cut = try await calls(pieces: 128 * kib, [(0, 100 * kib..<300 * kib)])
        #expect(
            cut == [
                .shared(Int64(28 * kib), count: 128 * kib), .bytes(0, count: 28 * kib),
                .bytes(Int64(156 * kib), count: 44 * kib),
            ])
    }

    /// More neighbours than one call should take become several runs; nothing is left out or
    /// written twice.
    @Test(arguments: [1, 63, 64, 65, 66, 128, 129, 200])
    func manyNeighbours(count: Int) async throws {
        let writes = (0..<count).map { number in
            (
                Int64(number * 2),
                Placement.Bytes.plain((count - 1 - number) * 2..<(count - number) * 2)
            )
        }
        let recorder = try await carryOut(writes, data: Self.data)
        let expected = (0..<count).reversed().flatMap { Self.data[$0 * 2..<$0 * 2 + 2] }
        #expect(recorder.memory.bytes == expected)
        #expect(recorder.memory.operations.count == count)
        #expect(recorder.calls.count == 1)
    }
}
