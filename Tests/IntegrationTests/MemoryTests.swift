import Foundation
import TestSupport
import Testing

/// Buffers are the larger part of what a conversion takes.
@Suite(.enabled(if: hasProgram("time"))) struct MemoryTests {
    /// As many cores take as many buffers.
    static let isSmallMachine = ProcessInfo.processInfo.activeProcessorCount <= 8

    /// Many workers may read, but only one at a time can write: those that have nothing to do need no buffer.
    @Test(.enabled(if: isSmallMachine))
    func manyWorkersTakeNoMoreMemoryThanOneWriterNeeds() throws {
        let folder = try TempFolder()
        // Just written, so that no read waits for a disk; long enough for each worker to start.
        try writeNoise(folder.path("source"), count: 160 << 20)
        let line = "convert -m 64 -W -f raw -O qcow2 source target".words
        let outcome = try run("time", ["-f", "%M", Swimg.path] + line, in: folder.path)
        #expect(outcome.isSuccess, "\(outcome)")
        let peak = try #require(Int(outcome.errorText.dropLast()), "\(outcome)")
        // 64 buffers of 512 KiB alone would be 32 MiB.
        #expect(peak < 24 << 10, "KiB; \(outcome)")
    }
}
