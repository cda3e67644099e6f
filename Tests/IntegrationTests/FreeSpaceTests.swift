import Foundation
import Glibc
import TestSupport
import Testing

/// The check of free space before the work, which must not refuse a file system with enough space.
@Suite(.enabled(if: MountedFolder.isUsable && LoopDevice.isUsable, "mounts need root"))
struct FreeSpaceTests {
    static let lines = ["raw", "qcow2"].flatMap { format in
        [
            "convert -S 0 -f raw -O \(format) SOURCE target",
            "convert -f raw -O \(format) -o preallocation=falloc SOURCE target",
            "convert -f raw -O \(format) -o preallocation=full SOURCE target",
            "create -q -f \(format) -o preallocation=falloc target 4M",
            "resize -q -f \(format) --preallocation=falloc small.\(format) +4M",
            "resize -q -f \(format) --preallocation=full small.\(format) +4M",
        ]
    }

    private func succeeds(_ line: String, on mount: MountedFolder) throws {
        let folder = try TempFolder()
        let source = folder.path("source")
        try DiskSketch("A-1b0+-C", size: 4 << 20).writeRaw(source)
        for format in ["raw", "qcow2"] {
            let name = mount.path("small.\(format)")
            try require(Swimg.path, ["create", "-q", "-f", format, name, "1M"])
        }
        let words = line.words.map { $0 == "SOURCE" ? source : $0 }
        expectSuccess(try run(Swimg.path, words, in: mount.path))
    }

    @Test(arguments: ["ramfs", "tmpfs"], lines)
    func noBlocksAreReported(_ type: String, _ line: String) throws {
        try succeeds(line, on: try MountedFolder(unlimited: type))
    }

    @Test(.enabled(if: hasProgram("mkfs.ext4")), arguments: lines)
    func onlyTheReserveIsLeft(_ line: String) throws {
        let make = ["mkfs.ext4", "-q", "-m", "50"]
        let mount = try MountedFolder(make: make, size: 64 << 20, sectorSize: 512)
        var space = statvfs()
        try #require(statvfs(mount.path, &space) == 0)
        let room = Int64(space.f_bavail) * Int64(space.f_frsize)
        try require("fallocate", ["-l", "\(room)", mount.path("filler")])
        try succeeds(line, on: mount)
    }

    /// The check still works: a disk that is too small is refused early, also for root.
    @Test(arguments: [
        "create -q -f raw -o preallocation=falloc target 1G",
        "create -q -f qcow2 -o preallocation=falloc target 1G",
    ])
    func aDiskThatIsTooSmall(_ line: String) throws {
        let mount = try MountedFolder(tmpfs: 4 << 20)
        let outcome = try run(Swimg.path, line.words, in: mount.path)
        expectRefusal(outcome, says: "needs 1073741824 bytes, the file system has")
        #expect(TempFolder.names(in: mount.path).isEmpty)
    }
}
