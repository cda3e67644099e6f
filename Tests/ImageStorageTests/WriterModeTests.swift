import Testing

@testable import ImageStorage

@Suite struct WriterModeTests {
    static let copying = CallTimes(wall: 200_000, work: 190_000)
    static let waiting = CallTimes(wall: 5_000_000, work: 100_000)

    @Test func oneByOneWhereCopyingIsTheWork() {
        var mode = WriterMode()
        for _ in 0..<10_000 { mode.noteLone(Self.copying) }
        #expect(!mode.isParallel)
    }

    /// The first write tells.
    @Test func besideEachOtherWhereTheStorageWaits() {
        var mode = WriterMode()
        mode.noteLone(Self.waiting)
        #expect(mode.isParallel)
    }

    @Test func aHiccupChangesNothing() {
        var mode = WriterMode()
        for _ in 0..<20 { mode.noteLone(Self.copying) }
        mode.noteLone(CallTimes(wall: 2_000_000, work: 190_000))
        #expect(!mode.isParallel)
    }

    /// Beside each other writes wait for the file's lock: only a lone one can tell.
    @Test func aLoneWriteIsTriedNowAndThen() {
        var mode = WriterMode()
        mode.noteLone(Self.waiting)
        var trials: [Int] = []
        for number in 0..<2000 where mode.isParallel {
            mode.noteParallel()
            guard !mode.isParallel else { continue }
            trials.append(number)
            mode.noteLone(Self.waiting)
        }
        #expect(trials == [127, 383, 895, 1919])
        while mode.isParallel { mode.noteParallel() }
        for _ in 0..<200 { mode.noteLone(Self.copying) }
        #expect(!mode.isParallel)
        // Earlier trials in vain count no more.
        mode.noteLone(CallTimes(wall: 50_000_000, work: 100_000))
        var count = 0
        while mode.isParallel {
            mode.noteParallel()
            count += 1
        }
        #expect(count == 128)
    }
}
