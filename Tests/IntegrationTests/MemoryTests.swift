import Foundation
import TestSupport
import Testing

/// Buffers are the larger part of what a conversion takes.
@Suite(.enabled(if: hasProgram("time"))) struct MemoryTests {
    /// As many cores take as many buffers.
    static let isSmallMachine = ProcessInfo.processInfo.activeProcessorCount <= 8

    /// The memory of the program beside its buffers, in MiB. The build for tests takes more.
    static let program = 18

    /// However many may work, and whatever they wait for. 64 buffers of 448 KiB alone would be 28
    /// MiB.
    @Test(.enabled(if: isSmallMachine))
    func manyWorkersTakeNoMoreMemoryThanIsAllowed() throws {
        let folder = try TempFolder()
        try writeNoise(folder.path("source"), count: 160 << 20)
        let peak = try peak(
            of: "convert -m 64 --memory 8M -W -f raw -O qcow2 source target", in: folder.path)
        #expect(peak < (8 + Self.program) << 10, "KiB")
    }

    /// Storage that waits gets all that may be taken, and no more.
    @Test(.enabled(if: isSmallMachine && SlowCalls.isUsable), arguments: [16, 64])
    func waitingTakesNoMoreMemoryThanIsAllowed(mebibytes: Int) throws {
        let folder = try TempFolder()
        try writeNoise(folder.path("source"), count: 160 << 20)
        let slow = try SlowCalls(milliseconds: 20)
        let peak = try peak(
            of: "convert --memory \(mebibytes)M -W -f raw -O raw source target", in: folder.path,
            environment: slow.environment)
        #expect((mebibytes / 2) << 10 < peak && peak < (mebibytes + Self.program) << 10, "KiB")
    }

    private func peak(
        of line: String, in folder: String, environment: [String: String] = [:]
    ) throws -> Int {
        let outcome = try run(
            "time", ["-f", "%M", Swimg.path] + line.words, in: folder, environment: environment)
        #expect(outcome.isSuccess, "\(outcome)")
        // Behind all else.
        let peak = outcome.errorText.split(separator: "\n").last.flatMap { Int($0) }
        return try #require(peak, "\(outcome)")
    }
}
