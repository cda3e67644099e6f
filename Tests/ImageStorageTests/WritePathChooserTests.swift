import Testing

@testable import ImageStorage

/// A machine with given rates in bytes per nanosecond, which change while it writes.
@Suite struct WritePathChooserTests {
    private struct Machine {
        var chooser = WritePathChooser()
        var cached: Double
        var direct: Double
        var time: Double = 0
        var directBytes = 0

        /// Writes `count` pieces of 512 KiB.
        mutating func write(_ count: Int) {
            for _ in 0..<count {
                let rate = chooser.isDirect ? direct : cached
                if chooser.isDirect { directBytes += 512 << 10 }
                let nanoseconds = Double(512 << 10) / rate
                time += nanoseconds
                chooser.note(bytes: 512 << 10, time: Int64(nanoseconds))
            }
        }
    }

    @Test func beginsInTheCacheAndStaysIfThatIsFast() {
        var machine = Machine(cached: 3.5, direct: 10)
        #expect(!machine.chooser.isDirect)
        machine.write(4096)
        #expect(machine.directBytes == 0)
    }

    @Test(arguments: [(0.4, 1.2), (0.07, 0.35), (1.5, 2.5)])
    func goesPastASlowCache(_ cached: Double, _ direct: Double) {
        var machine = Machine(cached: cached, direct: direct)
        machine.write(8192)
        #expect(machine.chooser.isDirect)
        let best = Double(8192 << 19) / direct
        #expect(machine.time < best * 1.15, "\(machine.time / best)")
    }

    /// Trials cost next to nothing on a slow disk, or on one that is no better.
    @Test(arguments: [(1.9, 0.1), (1.0, 0.05), (0.5, 0.55), (1.5, 1.5)])
    func isNotSlowedDownByTrials(_ cached: Double, _ direct: Double) {
        var machine = Machine(cached: cached, direct: direct)
        machine.write(8192)
        let best = Double(8192 << 19) / cached
        #expect(machine.directBytes > 0 && machine.directBytes < 100 << 20)
        #expect(machine.time < best * 1.05, "\(machine.time / best)")
    }

    @Test func followsChanges() {
        var machine = Machine(cached: 4, direct: 1.2)
        machine.write(512)
        #expect(machine.directBytes == 0)
        // The kernel runs out of free pages.
        machine.cached = 0.4
        machine.write(128)
        #expect(machine.chooser.isDirect)
        // The kernel has free pages again.
        machine.cached = 4
        machine.write(1024)
        #expect(!machine.chooser.isDirect)
        // Direct writes suddenly take long, and are given up at once.
        machine.cached = 0.4
        machine.write(128)
        #expect(machine.chooser.isDirect)
        machine.direct = 0.1
        machine.write(128)
        #expect(!machine.chooser.isDirect)
    }

    /// The rate never drops by half at once.
    @Test func noticesThatTheCacheGetsSlowerBitByBit() {
        var machine = Machine(cached: 1.9, direct: 1.2)
        machine.write(16384)
        #expect(!machine.chooser.isDirect)
        for _ in 0..<8 {
            machine.cached *= 0.8
            machine.write(64)
        }
        #expect(machine.chooser.isDirect)
    }

    @Test func settlesForTheCache() {
        var machine = Machine(cached: 0.4, direct: 1.2)
        machine.write(64)
        #expect(machine.chooser.isDirect)
        machine.chooser.settleForCache()
        machine.directBytes = 0
        machine.write(4096)
        #expect(machine.directBytes == 0)
    }
}
