import Foundation
import TestSupport
import Testing

/// Limits on memory, most of which conversions use for buffers.
@Suite(.enabled(if: hasProgram("time"))) struct MemoryTests {
    /// More cores use more buffers.
    static let isSmallMachine = ProcessInfo.processInfo.activeProcessorCount <= 8

    /// Memory of the program without its buffers, in MiB. Debug builds need more than release
    /// builds.
    static let program = 18

    /// The limit must hold for any number of workers: 64 buffers of 448 KiB would take 28 MiB.
    @Test(.enabled(if: isSmallMachine))
    func manyWorkersTakeNoMoreMemoryThanIsAllowed() throws {
        let folder = try TempFolder()
        try writeNoise(folder.path("source"), count: 160 << 20)
        let peak = try peak(
            of: "convert -m 64 --memory 8M -W -f raw -O qcow2 source target", in: folder.path)
        #expect(peak < (8 + Self.program) << 10, "KiB")
    }

    /// On slow storage a conversion uses most of the permitted memory, but no more.
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

    /// A header can name a refcount table as long as its file, and the file can be a hole.
    @Test(.enabled(if: Qemu.isInstalled, "the judge is qemu-img"))
    func hugeRefcountTableIsNotReadWhole() throws {
        let folder = try TempFolder()
        let path = folder.path("image")
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
        // Bytes 56 to 59: the length of the table in clusters.
        try file.seek(toOffset: 56)
        file.write(Data([0, 0x10, 0, 0]))
        try file.truncate(atOffset: 4 << 40)
        try file.close()
        let peak = try peak(of: "measure -O qcow2 image", in: folder.path)
        #expect(peak < (40 + Self.program) << 10, "KiB")
    }

    private func peak(
        of line: String, in folder: String, environment: [String: String] = [:]
    ) throws -> Int {
        let outcome = try run(
            "time", ["-f", "%M", Swimg.path] + line.words, in: folder, environment: environment)
        #expect(outcome.isSuccess, "\(outcome)")
        // `time` prints its number last.
        let peak = outcome.errorText.split(separator: "\n").last.flatMap { Int($0) }
        return try #require(peak, "\(outcome)")
    }
}
