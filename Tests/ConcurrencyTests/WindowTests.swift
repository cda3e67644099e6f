import Testing

@testable import Concurrency

/// Tests the window on several kinds of storage, in simulated time.
@Suite struct WindowTests {
    /// A simulated machine: cores that copy, and a storage that takes its time.
    struct Storage {
        /// Latency of a chunk in nanoseconds.
        var latency: Double = 0
        /// Bandwidth that all chunks share, in bytes per nanosecond.
        var bandwidth: Double = .infinity
        /// Time of copying in nanoseconds per byte.
        var work = 0.5
        static let cores = 2

        static let pageCache = Storage()
        static let milliseconds = 1_000_000.0
    }

    static let bounds = Window.Bounds(
        base: 4, most: 32, unit: 65536, shortChunk: 2 << 20, longChunk: 2 << 20,
        longestChunk: 2 << 20, cores: Storage.cores)

    /// Moves chunks, as many at once as the window allows.
    final class Run {
        /// The read or the write of a chunk.
        private struct Call {
            var isRead: Bool
            var bytes: Int64
            var end: Double
            var times: CallTimes
        }

        var window: Window
        var now = 0.0
        private(set) var done = 0.0
        private(set) var sizes: [Int] = []
        private var flying: [Call] = []
        private var coreFree = Array(repeating: 0.0, count: Storage.cores)
        private var channelFree = 0.0

        init(_ bounds: Window.Bounds = WindowTests.bounds) { window = Window(bounds, now: 0) }

        func carry(_ count: Int, on storage: Storage) {
            for _ in 0..<count {
                while flying.count < window.size { begin(storage) }
                carryOne(storage)
            }
        }

        private func carryOne(_ storage: Storage) {
            while true {
                let index = flying.indices.min { flying[$0].end < flying[$1].end } ?? 0
                let call = flying.remove(at: index)
                now = max(now, call.end)
                if call.isRead {
                    window.noteRead(bytes: call.bytes, times: call.times, now: Int64(now))
                    begin(storage, bytes: call.bytes, isRead: false)
                    while flying.count < window.size { begin(storage) }
                } else {
                    done += Double(call.bytes)
                    window.noteChunk(bytes: call.bytes, times: call.times, now: Int64(now))
                    return sizes.append(window.size)
                }
            }
        }

        private func begin(_ storage: Storage) {
            begin(storage, bytes: window.chunkSize, isRead: true)
        }

        private func begin(_ storage: Storage, bytes: Int64, isRead: Bool) {
            let core = coreFree.indices.min { coreFree[$0] < coreFree[$1] } ?? 0
            let work = Double(bytes) * storage.work / 2
            let copied = max(now, coreFree[core]) + work
            coreFree[core] = copied
            let sent = max(copied, channelFree) + Double(bytes) / storage.bandwidth / 2
            channelFree = storage.bandwidth.isFinite ? sent : 0
            let end = sent + storage.latency / 2
            flying.append(
                Call(
                    isRead: isRead, bytes: bytes, end: end,
                    times: .call(wall: work + end - copied, work: work, slept: end > copied)))
        }
    }

    @Test func staysSmallWhereCopyingIsTheWork() {
        let run = Run()
        run.carry(1000, on: .pageCache)
        #expect(run.sizes.allSatisfy { $0 == Self.bounds.base })
        #expect(run.window.chunkSize == Self.bounds.shortChunk)
    }

    /// The window grows within a moment and then stays: the throughput is what the cores can copy,
    /// or what the budget allows.
    @Test(arguments: [1.0, 5, 20, 100])
    func growsWhereTheStorageWaits(_ milliseconds: Double) {
        let storage = Storage(latency: milliseconds * Storage.milliseconds)
        let run = Run()
        run.carry(40, on: storage)
        #expect(run.now < 20 * storage.latency + 200 * Storage.milliseconds)
        let (begin, before, known) = (run.now, run.done, run.sizes.count)
        run.carry(1000, on: storage)
        let budget = Double(Self.bounds.most) * Double(Self.bounds.longestChunk)
        let ideal = min(Double(Storage.cores) / storage.work, budget / storage.latency)
        #expect((run.done - before) / (run.now - begin) > 0.7 * ideal)
        let changes = zip(run.sizes[known...], run.sizes[known...].dropFirst()).count { $0 != $1 }
        #expect(changes <= 4, "it swings: \(changes)")
    }

    /// Before the first chunk is done, its throughput is a guess, here much too high: the second
    /// read takes much longer. The next guess is better and comes at once.
    @Test func aWrongGuessIsForgottenSoon() {
        let run = Run()
        run.carry(1, on: Storage(latency: 8 * Storage.milliseconds))
        run.carry(60, on: Storage(latency: 60 * Storage.milliseconds))
        #expect(run.window.size > 2 * Self.bounds.base)
    }

    /// A request costs the same at any length.
    @Test func chunksGrowWhereFewAreAllowed() {
        var bounds = Self.bounds
        bounds.most = 8
        bounds.longestChunk = 8 << 20
        let run = Run(bounds)
        run.carry(200, on: Storage(latency: 20 * Storage.milliseconds))
        #expect(run.window.size == 8)
        #expect(run.window.chunkSize > bounds.longChunk)
    }

    /// More chunks in flight bring no more throughput, so the window stays small except for trials.
    @Test(arguments: [0.1, 1])
    func goesBackWhereBandwidthIsTheLimit(_ bandwidth: Double) {
        let storage = Storage(latency: 0.2 * Storage.milliseconds, bandwidth: bandwidth)
        let run = Run()
        run.carry(4000, on: storage)
        let large = run.sizes.count { $0 > 2 * Self.bounds.base }
        #expect(large < run.sizes.count / 4, "\(large)")
        #expect(run.done / run.now > 0.95 * bandwidth)
    }

    @Test func followsAStorageThatChanges() {
        let run = Run()
        run.carry(200, on: .pageCache)
        #expect(run.window.size == Self.bounds.base)
        run.carry(200, on: Storage(latency: 10 * Storage.milliseconds))
        #expect(run.window.size > 4 * Self.bounds.base)
        run.carry(400, on: .pageCache)
        #expect(run.window.size == Self.bounds.base)
        #expect(run.window.chunkSize == Self.bounds.shortChunk)
        run.carry(200, on: Storage(latency: 10 * Storage.milliseconds))
        #expect(run.window.size > 4 * Self.bounds.base)
    }

    /// Another process had the processor once.
    @Test func aHiccupChangesNothing() {
        let run = Run()
        run.carry(100, on: .pageCache)
        run.carry(1, on: Storage(latency: 0.4 * Storage.milliseconds))
        run.carry(100, on: .pageCache)
        #expect(run.sizes.allSatisfy { $0 == Self.bounds.base })
    }

    @Test func limitsHold() {
        var bounds = Self.bounds
        (bounds.base, bounds.most) = (1, 1)
        let run = Run(bounds)
        run.carry(100, on: Storage(latency: 20 * Storage.milliseconds))
        #expect(run.sizes.allSatisfy { $0 == 1 })
        run.window.raiseBase(to: 7)
        #expect(run.window.size == 1)
    }

    @Test func moreAreEnoughToDecompress() {
        var window = Window(Self.bounds, now: 0)
        window.raiseBase(to: 7)
        #expect(window.size == 7)
        window.raiseBase(to: 2)
        #expect(window.size == 7)
    }
}

@Suite struct WindowQueueTests {
    private func fullQueue() -> WindowQueue<Int> {
        var queue = WindowQueue<Int>(Window(WindowTests.bounds, now: 0))
        let lengths = (1...5).map { _ in queue.enter() }
        let short = WindowTests.bounds.shortChunk
        #expect(lengths == [short, short, short, short, nil])
        let areInside = (1...4).map { queue.arrive($0) }
        #expect(areInside == [false, false, false, false])
        return queue
    }

    @Test func whoWaitedLongestComesFirst() {
        var queue = fullQueue()
        for number in 1...3 {
            let newcomers = queue.leave(bytes: 1, total: CallTimes(), now: Int64(number))
            #expect(newcomers == [number])
        }
        #expect(queue.waiters == [4] && queue.inside == 4)
    }

    @Test func allComeInThatThereIsRoomFor() {
        var queue = fullQueue()
        let newcomers = queue.raiseBase(to: 7)
        #expect(newcomers == [1, 2, 3])
        #expect(queue.inside == 7)
        let total = CallTimes(wall: 50_000_000, work: 100_000, calls: 2, sleeps: 2)
        let next = queue.noteRead(bytes: 448 << 10, total: total, now: 50_000_000)
        #expect(next == [4])
        #expect(queue.window.size > 8 && queue.inside == 8)
    }

    /// The gate gets sums over all calls, and the window the change since the last report.
    @Test func callsCountOnce() {
        var queue = WindowQueue<Int>(Window(WindowTests.bounds, now: 0))
        let total = CallTimes(wall: 50_000_000, work: 100_000, calls: 2, sleeps: 2)
        for number in 0..<200 {
            _ = queue.enter()
            _ = queue.noteRead(
                bytes: 448 << 10, total: total, now: 50_000_000 + Int64(number) * 200_000)
            let newcomers = queue.leave(
                bytes: 448 << 10, total: total, now: 50_000_000 + Int64(number) * 200_000)
            #expect(newcomers.isEmpty)
        }
        #expect(queue.window.size == WindowTests.bounds.base)
    }
}
