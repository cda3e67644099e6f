import Foundation
import Glibc
import TestSupport
import Testing

/// On file systems that support it, blocks are shared instead of copied, with identical bytes.
@Suite(
    .enabled(
        if: Qemu.isInstalled && MountedFolder.isUsable && LoopDevice.isUsable
            && hasProgram("filefrag"), "mounts need root"))
struct SharingTests {
    static let fileSystems = [
        (make: ["mkfs.xfs", "-q"], megabytes: 320), (make: ["mkfs.btrfs", "-q"], megabytes: 256),
    ]
    static let targets = ["-O raw", "-W -O raw", "-O qcow2", "-W -O qcow2 -o cluster_size=4k"]
    /// Neither a whole number of blocks nor of sectors.
    private static let size = 24_000_123

    /// Makes sources with data, a hole, zeros that take space, and data up to the odd end.
    private func makeSources(_ folder: String) throws {
        let raw = folder + "/source.raw"
        let file = try newFile(raw)
        try file.truncate(atOffset: UInt64(Self.size))
        for (offset, bytes) in [
            (0, noise(1, 8 << 20)), (12 << 20, [UInt8](repeating: 0, count: 1 << 20)),
            (13 << 20, noise(2, Self.size - 13 << 20)),
        ] {
            try file.seek(toOffset: UInt64(offset))
            try file.write(contentsOf: Data(bytes))
        }
        try file.close()
        let qcow2 = folder + "/source.qcow2"
        try Qemu.img("convert", "-f", "raw", "-O", "qcow2", "-S", "0", raw, qcow2)
        // Clusters out of order, so that runs break.
        try Qemu.io(
            "qcow2", qcow2, ["write -P 7 9M 192k", "write -P 8 8M 64k", "write -z 2M 128k"])
        try require("sync", [])
    }

    /// The number of bytes of a file in shared blocks.
    private func shared(_ path: String) throws -> Int {
        try require("sync", [])
        let outcome = try run("filefrag", ["-v", "-b512", path])
        #expect(outcome.isSuccess, "\(outcome)")
        return outcome.outputText.split(separator: "\n").filter { $0.contains("shared") }
            .compactMap { line in
                // ext: logical: physical: length: expected: flags
                line.split(separator: ":").dropFirst(3).first.flatMap {
                    Int($0.trimmingCharacters(in: .whitespaces))
                }
            }.reduce(0, +) * 512
    }

    /// The blocks of the source are plain text, so an encrypted image takes none of them, in a data
    /// file neither.
    @Test(arguments: fileSystems, ["", "data_file=data"])
    func encryptedImagesShareNothing(
        _ fileSystem: (make: [String], megabytes: Int), _ options: String
    ) throws {
        guard hasProgram(fileSystem.make[0]) else { return }
        let mount = try MountedFolder(
            make: fileSystem.make, size: fileSystem.megabytes << 20, sectorSize: 512)
        try writeNoise(mount.path("source"), count: 8 << 20)
        let image = mount.path("own")
        let data = mount.path("own.data")
        let file = options.isEmpty ? [] : ["-o", "data_file=\(data)"]
        let named = EncryptedImage.options("qcow2", image)
        for words in [
            ["-O", "qcow2", "-o", EncryptedImage.creation("qcow2")] + file
                + ["-f", "raw", mount.path("source"), image],
            ["-n", "-f", "raw", "--target-image-opts", mount.path("source"), named],
        ] {
            let own = try Swimg.convert(EncryptedImage.secret + words)
            #expect(own.isSuccess, "\(own)")
            #expect(try shared(file.isEmpty ? image : data) == 0)
            try require(
                "qemu-img",
                ["compare"] + EncryptedImage.secret
                    + ["--image-opts", "driver=raw,file.filename=\(mount.path("source"))", named])
        }
    }

    /// An image cut within its last cluster: the missing part reads as zeros, as with qemu-img. If
    /// whole clusters are missing, the conversion fails and shares nothing.
    @Test(arguments: fileSystems, [-1 << 20, 0, 1, 4096, 65535])
    func whatLiesBehindTheEndIsZero(
        _ fileSystem: (make: [String], megabytes: Int), kept: Int
    ) throws {
        guard hasProgram(fileSystem.make[0]) else { return }
        let mount = try MountedFolder(
            make: fileSystem.make, size: fileSystem.megabytes << 20, sectorSize: 512)
        let disk = mount.path("disk.raw")
        try writeNoise(disk, count: 8 << 20)
        let source = mount.path("source.qcow2")
        try Qemu.img("convert", "-f", "raw", "-O", "qcow2", disk, source)
        let lastEnd = try #require(
            Qemu.map(source, "qcow2").compactMap { entry in
                entry.offset.map { Int($0 + entry.length) }
            }.max())
        #expect(truncate(source, lastEnd - 65536 + kept) == 0)
        for options in ["-O raw", "-W -O raw", "-O qcow2", "-S 4k -O raw"] {
            let format = options.hasSuffix("raw") ? "raw" : "qcow2"
            let outcome = try Swimg.convert(
                options.words + ["-f", "qcow2", source, mount.path("own")])
            guard kept > 0 else {
                #expect(
                    outcome.status == 1 && outcome.errorText.contains("cut short"), "\(outcome)")
                continue
            }
            try Qemu.img(
                "convert", "-f", "qcow2", "-O", "raw", source, mount.path("theirs"))
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
            #expect(
                try Qemu.difference(mount.path("theirs"), "raw", mount.path("own"), format) == nil,
                "\(outcome)")
        }
    }

    @Test(arguments: some(of: targets, with: fileSystems))
    func sharesWhatItCan(_ target: String, _ fileSystem: (make: [String], megabytes: Int)) throws {
        guard hasProgram(fileSystem.make[0]) else { return }
        let mount = try MountedFolder(
            make: fileSystem.make, size: fileSystem.megabytes << 20, sectorSize: 512)
        try makeSources(mount.path)
        let elsewhere = try TempFolder()
        let format = target.contains("qcow2") ? "qcow2" : "raw"
        for name in ["raw", "qcow2"] {
            let source = mount.path("source.\(name)")
            let path = mount.path("target")
            let line = target.words + ["-f", name, source]
            let outcome = try Swimg.convert(line + [path])
            try judge(outcome, path, format, against: source, name)
            #expect(try shared(path) >= 17 << 20, "\(outcome)")

            // Copying gives the same bytes, whether forced or because the blocks cannot be shared.
            let copied = try Swimg.convert(["--no-clone"] + line + [mount.path("copied")])
            try judge(copied, mount.path("copied"), format, against: source, name)
            #expect(try shared(mount.path("copied")) == 0, "\(copied)")
            let other = try Swimg.convert(line + [elsewhere.path("target")])
            #expect(other.isSuccess, "\(other)")
            let sum = try sha256(path)
            #expect(try sha256(mount.path("copied")) == sum, "\(outcome)")
            #expect(try sha256(elsewhere.path("target")) == sum, "\(other)")
        }
        // Later changes to the sources do not affect the targets.
        let before = try sha256(mount.path("target"))
        for name in ["raw", "qcow2"] {
            let source = mount.path("source.\(name)")
            let length = try contents(source).count
            let handle = try FileHandle(forUpdating: URL(fileURLWithPath: source))
            try handle.write(contentsOf: Data(repeating: 0x55, count: length))
            try handle.close()
        }
        try require("sync", [])
        #expect(try sha256(mount.path("target")) == before)
    }

    /// An explicit -S reads every byte: zeros that take space in the source take none in the
    /// target.
    @Test(arguments: fileSystems)
    func looksForZerosWhenAsked(_ fileSystem: (make: [String], megabytes: Int)) throws {
        guard hasProgram(fileSystem.make[0]) else { return }
        let mount = try MountedFolder(
            make: fileSystem.make, size: fileSystem.megabytes << 20, sectorSize: 512)
        try makeSources(mount.path)
        func taken(_ options: String) throws -> Int {
            let path = mount.path("target")
            let outcome = try Swimg.convert(
                options.words + ["-f", "raw", "-O", "raw", mount.path("source.raw"), path])
            try judge(outcome, path, "raw", against: mount.path("source.raw"))
            try require("sync", [])
            let blocks = try run("stat", ["--format=%b", path]).outputText
            return try #require(Int(blocks.trimmingCharacters(in: .whitespacesAndNewlines))) * 512
        }
        let shared = try taken("")
        let scanned = try taken("-S 4k")
        // A file system may reserve some blocks after the end of a file.
        #expect(abs(shared - scanned - 1 << 20) <= 128 << 10)
        #expect(try self.shared(mount.path("target")) >= 17 << 20)
        // -S 0 stores every byte anew.
        #expect(try taken("-S 0") >= Self.size)
        #expect(try self.shared(mount.path("target")) == 0)
    }

    /// A source file without holes may contain stored zeros: swimg reads it, its zeros take no
    /// space in the target, and the rest is shared.
    @Test(arguments: fileSystems)
    func aSourceWithoutHolesLosesItsZeros(
        _ fileSystem: (make: [String], megabytes: Int)
    ) throws {
        guard hasProgram(fileSystem.make[0]) else { return }
        let mount = try MountedFolder(
            make: fileSystem.make, size: fileSystem.megabytes << 20, sectorSize: 512)
        let raw = mount.path("dense.raw")
        let file = try newFile(raw)
        try file.write(contentsOf: Data(noise(1, 4 << 20)))
        try file.write(contentsOf: Data(count: 20 << 20))
        try file.write(contentsOf: Data(noise(2, 4 << 20)))
        try file.close()
        let qcow2 = mount.path("dense.qcow2")
        try Qemu.img("convert", "-f", "raw", "-O", "qcow2", "-S", "0", raw, qcow2)
        try require("sync", [])
        for (source, format) in [(raw, "raw"), (qcow2, "qcow2")] {
            for options in ["", "-W", "-n"] {
                let target = mount.path("target")
                if options == "-n" { try newFile(target).truncate(atOffset: 28 << 20) }
                let outcome = try Swimg.convert(
                    options.words + ["-f", format, "-O", "raw", source, target])
                try judge(outcome, target, "raw", against: raw)
                try require("sync", [])
                let taken = try #require(FileStatus(target)).allocated
                // A file system may reserve some blocks after the end of a file.
                #expect(taken <= 8448 << 10, "\(taken): \(outcome)")
                #expect(try shared(target) >= 7 << 20, "\(outcome)")
                let joined = try Swimg.convert(
                    ["-f", format, "-O", "raw", source, source, mount.path("joined")])
                #expect(joined.isSuccess, "\(joined)")
                try require("sync", [])
                let both = try #require(FileStatus(mount.path("joined"))).allocated
                #expect(both <= 16640 << 10, "\(both): \(joined)")
            }
        }
    }

    /// Data that can be shared is not read: for a raw target that is everything.
    @Test(.enabled(if: canTraceSystemCalls, "needs strace and the right to trace"))
    func readsNothingForARawTarget() throws {
        let mount = try MountedFolder(make: ["mkfs.xfs", "-q"], size: 320 << 20, sectorSize: 512)
        try makeSources(mount.path)
        let outcome = try run(
            "strace",
            [
                "-f", "-qq", "-e", "trace=pread64,pwritev", "-o", mount.path("log"), Swimg.path,
                "convert", "-f", "raw", "-O", "raw", mount.path("source.raw"),
                mount.path("target"),
            ])
        #expect(outcome.isSuccess, "\(outcome)")
        let log = String(decoding: try contents(mount.path("log")), as: UTF8.self)
        let sizes = log.split(separator: "\n").compactMap {
            Int($0.split(separator: " ").last ?? "")
        }
        // The odd end and its padding to a sector are copied.
        #expect(sizes.count >= 3 && sizes.allSatisfy { $0 <= 4096 }, "\(log)")
    }

    @Test func copiesFromAnotherFileSystem() throws {
        let mount = try MountedFolder(make: ["mkfs.xfs", "-q"], size: 320 << 20, sectorSize: 512)
        let folder = try TempFolder()
        try makeSources(folder.path)
        for (name, target) in [("raw", "-O raw"), ("qcow2", "-O raw"), ("raw", "-O qcow2")] {
            let source = folder.path("source.\(name)")
            let outcome = try Swimg.convert(
                ["-C", "-f", name] + target.words + [source, mount.path("target")])
            let format = target.contains("qcow2") ? "qcow2" : "raw"
            try judge(
                outcome, mount.path("target"), format, against: source, name)
        }
    }
}
