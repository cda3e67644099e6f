import Foundation
import Glibc

/// A loop device over a file, detached when the last reference is released.
public final class LoopDevice: Sendable {
    public let path: String
    private let folder: TempFolder?

    public static let isUsable: Bool = {
        guard isRoot, hasProgram("losetup") else { return false }
        return (try? LoopDevice(size: 1 << 20, sectorSize: 512, fill: 0)) != nil
    }()

    /// Makes a device of `size` bytes that all have the value `fill`.
    public convenience init(size: Int, sectorSize: Int, fill: UInt8) throws {
        let folder = try TempFolder()
        try writeFilled(folder.path("disk"), byte: fill, count: size)
        try self.init(over: folder.path("disk"), sectorSize: sectorSize, folder: folder)
    }

    public init(over file: String, sectorSize: Int, folder: TempFolder? = nil) throws {
        self.folder = folder
        var attempt = 0
        while true {
            // Other tests look for a free device too, and finding and taking one is not atomic.
            let outcome = try run(
                "losetup", ["--find", "--show", "--sector-size", "\(sectorSize)", file])
            if outcome.isSuccess {
                path = outcome.outputText.trimmingCharacters(in: .whitespacesAndNewlines)
                return
            }
            attempt += 1
            guard attempt < 20 else { throw CommandError(description: outcome.description) }
            usleep(50_000)
        }
    }

    deinit { _ = try? run("losetup", ["--detach", path]) }
}

/// A file system that is mounted for one test.
public final class MountedFolder: Sendable {
    public let path: String
    private let folder: TempFolder
    private let device: LoopDevice?

    public static let isUsable: Bool = {
        guard isRoot, hasProgram("mount") else { return false }
        return (try? MountedFolder(tmpfs: 1 << 20)) != nil
    }()

    public init(tmpfs size: Int) throws {
        folder = try TempFolder()
        device = nil
        path = try folder.makeFolder("mnt")
        try require("mount", ["-t", "tmpfs", "-o", "size=\(size)", "swimg-test", path])
    }

    /// Mounts a memory file system without a size limit (`ramfs`, `tmpfs`), which reports no
    /// blocks.
    public init(unlimited type: String) throws {
        folder = try TempFolder()
        device = nil
        path = try folder.makeFolder("mnt")
        try require("mount", ["-t", type, "-o", "size=0", "swimg-test", path])
    }

    /// Formats a disk of `size` bytes; `make` is a mkfs command such as `["mkfs.ext4", "-q"]`.
    public init(make: [String], size: Int, sectorSize: Int) throws {
        folder = try TempFolder()
        let disk = folder.path("disk")
        try newFile(disk).truncate(atOffset: UInt64(size))
        let loop = try LoopDevice(over: disk, sectorSize: sectorSize)
        device = loop
        path = try folder.makeFolder("mnt")
        try require(make[0], make.dropFirst() + [loop.path])
        try require("mount", [loop.path, path])
    }

    public func path(_ name: String) -> String { "\(path)/\(name)" }

    deinit { _ = try? run("umount", [path]) }
}
