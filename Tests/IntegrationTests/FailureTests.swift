import Foundation
import Glibc
import TestSupport
import Testing

/// Full file systems, read errors and process limits.
@Suite struct FailureTests {
    let folder: TempFolder

    init() throws { folder = try TempFolder() }

    @Test(
        .enabled(if: MountedFolder.isUsable, "mounting a small tmpfs needs root"),
        arguments: ["-O raw", "-O qcow2", "-O raw -S 0", "-W -O raw", "-W -O qcow2", "-c -O qcow2"])
    func fullDiskLeavesNothing(_ options: String) throws {
        let mount = try MountedFolder(tmpfs: 4 << 20)
        try writeNoise(folder.path("source"), count: 8 << 20)
        let line = ["-f", "raw"] + options.words
        let outcome = try Swimg.convert(line + [folder.path("source"), mount.path("target")])
        expectRefusal(outcome, says: "No space left")
        #expect(TempFolder.names(in: mount.path) == [], "\(outcome)")
    }

    @Test(
        .enabled(if: MountedFolder.isUsable, "mounting a small tmpfs needs root"),
        arguments: ["-O raw", "-O qcow2"])
    func fullDiskSparesTheOldTarget(_ options: String) throws {
        let mount = try MountedFolder(tmpfs: 4 << 20)
        let old = noise(7, 1 << 20)
        try Data(old).write(to: URL(fileURLWithPath: mount.path("target")))
        try writeNoise(folder.path("source"), count: 8 << 20)
        let line = ["-f", "raw"] + options.words
        let outcome = try Swimg.convert(line + [folder.path("source"), mount.path("target")])
        expectRefusal(outcome, says: "No space left")
        #expect(TempFolder.names(in: mount.path) == ["target"], "\(outcome)")
        #expect(try mismatch(contents(mount.path("target")), old) == nil, "\(outcome)")
    }

    /// A large virtual size with little data fits: the size alone must not cause a refusal.
    @Test(
        .enabled(if: MountedFolder.isUsable, "mounting a small tmpfs needs root"),
        arguments: ["-O raw", "-O qcow2"])
    func sparseDiskFits(_ options: String) throws {
        let mount = try MountedFolder(tmpfs: 4 << 20)
        let sketch = DiskSketch("A-1", size: 1 << 30)
        try sketch.writeRaw(folder.path("source"))
        let line = ["-f", "raw"] + options.words
        expectSuccess(try Swimg.convert(line + [folder.path("source"), mount.path("target")]))
        let format = options.contains("qcow2") ? "qcow2" : "raw"
        expectSuccess(try Swimg.convert("-f", format, mount.path("target"), folder.path("back")))
        let (back, source) = (folder.path("back"), folder.path("source"))
        #expect(try run("cmp", [back, source]).isSuccess)
    }

    /// A loop device whose backing file was truncated answers reads with EIO.
    @Test(
        .enabled(if: LoopDevice.isUsable, "loop devices need root"),
        arguments: ["-O raw", "-O qcow2", "-W -O raw", "-c -W -O qcow2", "-m 1 -O raw"])
    func readErrorLeavesNothing(_ options: String) throws {
        let targets = try folder.makeFolder("targets")
        let disk = folder.path("disk")
        try writeNoise(disk, count: 8 << 20)
        let loop = try LoopDevice(over: disk, sectorSize: 512)
        #expect(truncate(disk, 3 << 20) == 0)
        let line = ["-f", "raw"] + options.words
        let outcome = try Swimg.convert(line + [loop.path, targets + "/target"])
        expectRefusal(outcome, says: "Input/output error")
        #expect(outcome.errorText.contains(loop.path), "\(outcome)")
        #expect(TempFolder.names(in: targets) == [], "\(outcome)")
    }

    /// A file size limit below the disk's size makes the conversion fail.
    @Test(arguments: ["-O raw", "-O qcow2"])
    func fileSizeLimitLeavesNothing(_ options: String) throws {
        let targets = try folder.makeFolder("targets")
        try writeNoise(folder.path("source"), count: 4 << 20)
        let script = "ulimit -f 2048; exec \"$0\" convert -f raw \(options) \"$1\" \"$2\""
        let outcome = try run(
            "bash", ["-c", script, Swimg.path, folder.path("source"), targets + "/target"])
        expectRefusal(outcome, says: "File too large")
        #expect(TempFolder.names(in: targets) == [], "\(outcome)")
    }

    /// Three standard streams and a chain of four images leave one descriptor: an error, no partial
    /// target.
    @Test func descriptorLimitIsAnError() throws {
        let targets = try folder.makeFolder("targets")
        let script = "ulimit -n 8; exec \"$0\" convert -f qcow2 -O raw \"$1\" \"$2\""
        let chain = try Fixture.folderOfImages() + "/chain-of-four.qcow2"
        let outcome = try run("bash", ["-c", script, Swimg.path, chain, targets + "/target"])
        #expect(outcome.status == 1 && !outcome.errors.isEmpty, "\(outcome)")
        #expect(TempFolder.names(in: targets) == [], "\(outcome)")
    }

    /// OpenStack runs its converter under `prlimit --as=1073741824`.
    @Test(arguments: ["-O raw", "-c -m 16 -O qcow2"])
    func worksInOneGibibyteOfAddresses(_ options: String) throws {
        try writeNoise(folder.path("source"), count: 16 << 20)
        let script = "ulimit -v 1048576; exec \"$0\" convert -f raw \(options) \"$1\" \"$2\""
        let outcome = try run(
            "bash", ["-c", script, Swimg.path, folder.path("source"), folder.path("target")])
        expectSuccess(outcome)
        let format = options.contains("qcow2") ? "qcow2" : "raw"
        expectSuccess(try Swimg.convert("-f", format, folder.path("target"), folder.path("back")))
        #expect(try run("cmp", [folder.path("back"), folder.path("source")]).isSuccess)
    }
}
