import Concurrency
import Testing

@testable import ImageStorage

@Suite struct WriterModeTests {
    static let copying = CallTimes.call(wall: 200_000, work: 190_000, slept: false)
    static let waiting = CallTimes.call(wall: 5_000_000, work: 100_000)

    @Test func oneByOneWhereCopyingIsTheWork() {
        var mode = WriterMode()
        for _ in 0..<10_000 { mode.noteLone(Self.copying) }
        #expect(!mode.isParallel)
    }

    /// The first slow write alone proves nothing: it may have waited for the file system.
    @Test func besideEachOtherWhereTheStorageWaits() {
        var mode = WriterMode()
        mode.noteLone(Self.waiting)
        #expect(!mode.isParallel)
        mode.noteLone(Self.waiting)
        #expect(mode.isParallel)
    }

    /// A lone write waits for no other, so it need not wait many times as long as it copies.
    @Test func aMillisecondIsEnough() {
        var mode = WriterMode()
        for _ in 0..<4 { mode.noteLone(.call(wall: 1_600_000, work: 600_000)) }
        #expect(mode.isParallel)
    }

    @Test func aHiccupChangesNothing() {
        var mode = WriterMode()
        for _ in 0..<20 { mode.noteLone(Self.copying) }
        mode.noteLone(.call(wall: 20_000_000, work: 190_000))
        #expect(!mode.isParallel)
    }

    /// Concurrent writes wait for the file's lock, so only a lone write can tell.
    @Test func aLoneWriteIsTriedNowAndThen() {
        var mode = WriterMode()
        for _ in 0..<2 { mode.noteLone(Self.waiting) }
        var trials: [Int] = []
        for number in 0..<2000 where mode.isParallel {
            mode.noteParallel()
            guard !mode.isParallel else { continue }
            trials.append(number)
            for _ in 0..<2 { mode.noteLone(Self.waiting) }
        }
        #expect(trials == [127, 383, 895, 1919])
        while mode.isParallel { mode.noteParallel() }
        for _ in 0..<200 { mode.noteLone(Self.copying) }
        #expect(!mode.isParallel)
        // Earlier failed trials no longer count.
        for _ in 0..<20 where !mode.isParallel { mode.noteLone(Self.waiting) }
        var count = 0
        while mode.isParallel {
            mode.noteParallel()
            count += 1
        }
        #expect(count == 128)
    }
}
