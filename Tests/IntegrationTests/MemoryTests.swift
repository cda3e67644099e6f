import Foundation
import TestSupport
import Testing

/// Buffers are the larger part of what a conversion takes.
@Suite(.enabled(if: hasProgram("time"))) struct MemoryTests {
    /// As many cores take as many buffers.
    static let isSmallMachine = ProcessInfo.processInfo.activeProcessorCount <= 8

    /// The kernel knows of huge pages. Without, it refuses the advice by which the program is cut into pieces.
    static let canDivide = access("/sys/kernel/mm/transparent_hugepage", F_OK) == 0

    /// However many may work, and whatever they wait for. 64 buffers of 448 KiB alone would be 28
    /// MiB.
    @Test(.enabled(if: isSmallMachine))
    func manyWorkersTakeNoMoreMemoryThanIsAllowed() throws {
        let folder = try TempFolder()
        try writeNoise(folder.path("source"), count: 160 << 20)
        let peak = try peak(
            of: "convert -m 64 --memory 8M -W -f raw -O qcow2 source target", in: folder.path)
        #expect(peak < (8 + 14) << 10, "KiB")
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
        #expect((mebibytes / 2) << 10 < peak && peak < (mebibytes + 14) << 10, "KiB")
    }

    /// The kernel brings more of a program into memory than is used. What is long keeps it out.
    @Test(
        .enabled(if: canDivide),
        arguments: [
            ("-m 1 -O raw", "falloc", 900...1100), ("-pcm 1 -O qcow2", "falloc", 200...300),
            ("-m 1 -O raw", "off", (1000 << 10)...(1100 << 10)),
        ])
    func aLongConversionHasLessOfTheProgramInMemory(
        options: String, preallocation: String, mebibytes: ClosedRange<Int>
    ) throws {
        let folder = try TempFolder()
        try expectLessMemory(
            forMebibytes: mebibytes, in: folder.path,
            create: "-f qcow2 -o preallocation=\(preallocation) source",
            convert: "\(options) source target")
    }

    /// A raw image that is copied is not worth the cut. One whose blocks are shared is nothing but program.
    @Test(
        .enabled(
            if: canDivide && MountedFolder.isUsable && LoopDevice.isUsable, "mounts need root"),
        arguments: ["mkfs.xfs", "mkfs.btrfs"].filter(hasProgram))
    func aLargeRawImageToShareHasLessOfTheProgramInMemory(make: String) throws {
        let mount = try MountedFolder(make: [make, "-q"], size: 8 << 30, sectorSize: 512)
        try expectLessMemory(
            forMebibytes: 900...1100, in: mount.path,
            create: "-f raw -o preallocation=falloc source", convert: "-f raw -O raw source target")
    }

    /// The larger source takes 2 MiB less.
    private func expectLessMemory(
        forMebibytes sizes: ClosedRange<Int>, in folder: String, create: String, convert: String
    ) throws {
        let peaks = try [sizes.lowerBound, sizes.upperBound].map { size in
            let outcome = try run(Swimg.path, "create \(create) \(size)M".words, in: folder)
            #expect(outcome.isSuccess, "\(outcome)")
            return try peak(of: "convert \(convert)", in: folder)
        }
        #expect(peaks[1] + 2048 < peaks[0], "KiB: \(peaks)")
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
