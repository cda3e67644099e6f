import Concurrency
import DiskImage
import ImageFormats
import ImageStorage
import MemoryImages
import Synchronization
import Testing

@testable import ImageConvert

/// Numbers in the order in which tasks reported them.
final class Log: Sendable {
    private let list = Mutex<[Int64]>([])
    var numbers: [Int64] { list.withLock { $0 } }
    func append(_ number: some BinaryInteger) { list.withLock { $0.append(Int64(number)) } }
}

@Suite struct PipelineTests {
    static let block: Int64 = 64 << 10
    /// Data, holes and zeros over 40 blocks, more than there are workers.
    static let sketch = "AB0-CoDDDD00000000EF-G0H0I0J0000000000KL"

    private func copy(
        _ source: SketchSource, to storage: MemoryStorage, workers: Int, inOrder: Bool,
        qcow2: Bool, compress: Bool = false, ahead: Int? = nil, waits: Bool = false,
        overlaps: Bool = true
    ) async throws {
        let target: any ImageTarget =
            if qcow2 {
                try Qcow2Target(
                    storage: storage, virtualSize: source.virtualSize, options: Qcow2Options(),
                    compress: compress, minSparse: 4096)
            } else {
                RawTarget(storage: storage, minSparse: 4096, readsAsZero: true)
            }
        if !qcow2 { try await storage.truncate(to: source.virtualSize) }
        var pipeline = Pipeline(baseWorkers: ahead ?? workers, writesInOrder: inOrder)
        pipeline.mostWorkers = workers
        pipeline.writesOverlap = overlaps
        // With `ahead`, each worker starts, and waits for the others.
        pipeline.chunkSize = ahead == nil ? 7 * Self.block : Self.block
        if waits { pipeline.readMeters = [source.meter] }
        try await pipeline.copy(from: source, extents: source, to: target)
    }

    @Test(arguments: [1, 2, 8, 64], [true, false])
    func copiesToRaw(workers: Int, inOrder: Bool) async throws {
        let source = SketchSource(Self.sketch, blockSize: Self.block, pause: true)
        let storage = MemoryStorage()
        try await copy(source, to: storage, workers: workers, inOrder: inOrder, qcow2: false)
        #expect(storage.bytes == source.bytes)
    }

    /// A stream takes one write after the other; elsewhere ordered writes only begin in order.
    @Test(arguments: [true, false])
    func orderedWritesOverlapOrTakeTurns(_ overlaps: Bool) async throws {
        let source = SketchSource(Self.sketch, blockSize: Self.block, pause: true)
        let storage = MemoryStorage(writePause: .milliseconds(20))
        try await copy(
            source, to: storage, workers: 8, inOrder: true, qcow2: false, ahead: 8,
            overlaps: overlaps)
        #expect(storage.bytes == source.bytes)
        #expect((storage.mostWriters > 1) == overlaps)
        guard !overlaps else { return }
        let offsets = storage.operations.compactMap {
            if case .write(let range) = $0 { range.lowerBound } else { nil }
        }
        #expect(offsets == offsets.sorted())
    }

    @Test(arguments: [1, 2, 8], [true, false])
    func copiesWithFewChunksAhead(ahead: Int, inOrder: Bool) async throws {
        let source = SketchSource(Self.sketch, blockSize: Self.block, pause: true)
        let storage = MemoryStorage()
        try await copy(
            source, to: storage, workers: 8, inOrder: inOrder, qcow2: false, ahead: ahead)
        #expect(storage.bytes == source.bytes)
    }

    @Test(arguments: [true, false])
    func readsAheadWhileReadsSleep(inOrder: Bool) async throws {
        // Long blocks and long pauses: the walk over them must not take longer than the reads.
        let source = SketchSource(
            String(repeating: "A", count: 20), blockSize: 2 << 20, pause: true,
            readPause: 200...200)
        try await copy(
            source, to: MemoryStorage(), workers: 8, inOrder: inOrder, qcow2: false, ahead: 1,
            waits: true)
        #expect(source.mostReaders > 1)
    }

    @Test(arguments: [1, 2, 8, 64], [true, false])
    func copiesToTheSameQcow2(workers: Int, inOrder: Bool) async throws {
        for compress in [false, true] {
            let source = SketchSource(Self.sketch, blockSize: Self.block, pause: true)
            let reference = MemoryStorage()
            try await copy(
                source, to: reference, workers: 1, inOrder: true, qcow2: true, compress: compress)
            let storage = MemoryStorage()
            try await copy(
                source, to: storage, workers: workers, inOrder: inOrder, qcow2: true,
                compress: compress)
            #expect(storage.bytes == reference.bytes)
            let readBack = try await readAll(Qcow2Source(MemoryStorage(storage.bytes)))
            #expect(readBack == source.bytes)
        }
    }

    @Test func neverReadsMoreThanItHasWorkers() async throws {
        let source = SketchSource(
            String(repeating: "A", count: 400), blockSize: Self.block, pause: true)
        try await copy(source, to: MemoryStorage(), workers: 3, inOrder: false, qcow2: false)
        #expect(source.mostReaders <= 3)
    }

    /// An error anywhere ends the copy with that error: nobody waits for a turn that will not come.
    @Test(arguments: [1, 3, 8], [true, false])
    func everySourceErrorEndsIt(workers: Int, inOrder: Bool) async throws {
        for position in 0..<Self.sketch.count {
            let source = SketchSource(
                Self.sketch, blockSize: Self.block, failsFrom: Int64(position) * Self.block,
                pause: true)
            await #expect(throws: MemoryStorage.failure) {
                try await copy(
                    source, to: MemoryStorage(), workers: workers, inOrder: inOrder, qcow2: true,
                    ahead: 1 + position % 4)
            }
        }
    }

    @Test(arguments: [1, 3, 8], [true, false])
    func everyTargetErrorEndsIt(workers: Int, inOrder: Bool) async throws {
        let source = SketchSource(Self.sketch, blockSize: Self.block, pause: true)
        for (qcow2, compress) in [(true, false), (true, true), (false, false)] {
            let whole = MemoryStorage()
            try await copy(
                source, to: whole, workers: workers, inOrder: inOrder, qcow2: qcow2,
                compress: compress)
            for number in 0..<whole.operations.count {
                let storage = MemoryStorage()
                storage.fail(at: number)
                await #expect(throws: MemoryStorage.failure) {
                    try await copy(
                        source, to: storage, workers: workers, inOrder: inOrder, qcow2: qcow2,
                        compress: compress, ahead: 1 + number % 4)
                }
            }
        }
    }

    @Test func theHeaderComesLast() async throws {
        let source = SketchSource(Self.sketch, blockSize: Self.block)
        let storage = MemoryStorage()
        try await copy(source, to: storage, workers: 8, inOrder: false, qcow2: true)
        let operations = storage.operations
        guard case .write(let last) = operations.last else {
            Issue.record("the last operation is \(String(describing: operations.last))")
            return
        }
        #expect(last.lowerBound == 0)
        #expect(operations[operations.count - 2] == .flush)
        let headerWrites = operations.filter {
            if case .write(let range) = $0 { range.lowerBound < 512 } else { false }
        }
        #expect(headerWrites.count == 1)
    }

    @Test(arguments: [true, false], [2, nil])
    func cancellationEndsIt(inOrder: Bool, ahead: Int?) async throws {
        let source = SketchSource(
            String(repeating: "A", count: 200), blockSize: Self.block,
            stallsFrom: 100 * Self.block, pause: true)
        let storage = MemoryStorage()
        // Twelve chunks come before the stall. It cannot come to its end before it is cancelled:
        // one worker stalls, the others wait for their turn behind it.
        await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask {
                try await copy(
                    source, to: storage, workers: 8, inOrder: inOrder, qcow2: true, ahead: ahead)
            }
            while storage.operations.count < 10 { await Task.yield() }
            group.cancelAll()
            await #expect(throws: CancellationError.self) { try await group.next() }
        }
        // No header: nothing that looks like an image.
        #expect(storage.bytes.prefix(4).allSatisfy { $0 == 0 })
    }

    @Test func progressNeverGoesBack() async throws {
        let source = SketchSource(Self.sketch, blockSize: Self.block, pause: true)
        let log = Log()
        let storage = MemoryStorage()
        let target = RawTarget(storage: storage, minSparse: 4096, readsAsZero: true)
        try await Pipeline(baseWorkers: 8, writesInOrder: false, onProgress: { log.append($0) })
            .copy(from: source, extents: source, to: target)
        #expect(log.numbers == log.numbers.sorted())
        #expect(log.numbers.last == source.virtualSize)
    }
}
