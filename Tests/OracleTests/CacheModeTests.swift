import Foundation
import TestSupport
import Testing

/// `-t` and `-T`: cache modes change how bytes are written, never the bytes.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct CacheModeTests {
    static let modes = ["none", "directsync", "writethrough", "writeback", "unsafe"]
    static let targets = [
        "-O raw", "-W -O raw", "-O qcow2", "-O qcow2 -o cluster_size=512 -W",
        "-c -O qcow2", "-c -W -O qcow2 -o cluster_size=4k,compression_type=zstd",
    ]

    @Test(arguments: some(of: modes, with: targets))
    func onTheTemporaryFolder(_ mode: String, _ target: String) throws {
        let folder = try TempFolder()
        for name in ["raw-sparse", "zlib-512", "chain-shorter"] {
            try convert(name, "-t \(mode) -T \(mode) \(target)", to: folder.path("target"))
        }
    }

    @Test(
        .enabled(if: MountedFolder.isUsable && LoopDevice.isUsable, "mounts need root"),
        arguments: [
            (["mkfs.ext4", "-q"], 16, 512), (["mkfs.ext4", "-q", "-b", "4096"], 16, 4096),
            (["mkfs.ext4", "-q", "-b", "1024"], 16, 512), (["mkfs.xfs", "-q"], 320, 4096),
            (["mkfs.btrfs", "-q"], 128, 4096),
        ])
    func onFileSystems(_ make: [String], megabytes: Int, sector: Int) throws {
        // Not every machine has every mkfs; mkfs.ext4 exists wherever loop devices do.
        guard hasProgram(make[0]) || make[0] == "mkfs.ext4" else { return }
        let mount = try MountedFolder(make: make, size: megabytes << 20, sectorSize: sector)
        let raw = mount.path("source.raw")
        try SourceGallery.writeSparse(raw, SourceGallery.content)
        for mode in Self.modes {
            for target in Self.targets {
                let line = "-t \(mode) -T \(mode) -f raw \(target)".words
                let outcome = try Swimg.convert(line + [raw, mount.path("target")])
                let format = target.contains("qcow2") ? "qcow2" : "raw"
                try judge(outcome, mount.path("target"), format, against: raw)
            }
        }
        #expect(
            TempFolder.names(in: mount.path).filter { $0 != "lost+found" } == [
                "source.raw", "target",
            ])
    }

    /// O_DIRECT transfers whole sectors; a disk's size need not be a multiple.
    @Test(arguments: [1, 511, 513, 4095, 4097, 66049, 1_000_001], ["none", "directsync"])
    func oddSizesWithoutTheCache(_ size: Int, _ mode: String) throws {
        let folder = try TempFolder()
        let source = try folder.write("source", noise(UInt64(size), size))
        for target in Self.targets {
            let line = "-t \(mode) -T \(mode) -f raw \(target)".words
            let outcome = try Swimg.convert(line + [source, folder.path("target")])
            let format = target.contains("qcow2") ? "qcow2" : "raw"
            try judge(outcome, folder.path("target"), format, against: source)
            if format == "raw" {
                let bytes = try contents(folder.path("target"))
                #expect(bytes.count == (size + 511) / 512 * 512, "\(outcome)")
            }
        }
    }

    private func convert(_ name: String, _ line: String, to target: String) throws {
        let source = try SourceGallery.named(name)
        let outcome = try Swimg.convert(
            line.words + ["-f", source.format, source.path, target])
        let format = line.contains("qcow2") ? "qcow2" : "raw"
        try judge(outcome, target, format, against: SourceGallery.reference)
    }
}

/// The system calls of each cache mode, recorded by strace.
@Suite(.enabled(if: canTraceSystemCalls, "needs strace and the right to trace"))
struct SystemCallTests {
    private func trace(_ options: String) throws -> [Substring] {
        let folder = try TempFolder()
        try DiskSketch("A1-b").writeRaw(folder.path("source"))
        let calls =
            "open,openat,openat2,fcntl,fsync,fdatasync,sync_file_range,renameat,renameat2,rename"
        let outcome = try run(
            "strace",
            [
                "-f", "-qq", "-s", "256", "-e", "trace=" + calls, "-o", folder.path("log"),
                Swimg.path,
            ]
                + ["convert", "-f", "raw"] + options.words
                + ["source", "target"], in: folder.path)
        #expect(outcome.isSuccess && FileStatus(folder.path("target")) != nil, "\(outcome)")
        return String(decoding: try contents(folder.path("log")), as: UTF8.self).split(
            separator: "\n")
    }

    /// Whether a call sets the flag on the target, by open (under any temporary name) or fcntl.
    private func setsOnTarget(_ flag: String, _ calls: [Substring]) -> Bool {
        calls.contains {
            $0.contains(flag)
                && ($0.contains("O_RDWR") || $0.contains("O_WRONLY") || $0.contains("F_SETFL"))
        }
    }

    @Test(
        arguments: [
            ("none", true, false), ("directsync", true, true), ("writethrough", false, true),
            ("writeback", false, false), ("unsafe", false, false),
        ], ["-O raw", "-O qcow2", "-c -O qcow2"])
    func targetIsOpenedAsAsked(_ mode: (String, Bool, Bool), _ target: String) throws {
        let calls = try trace("-t \(mode.0) \(target)")
        let story = Comment(rawValue: calls.joined(separator: "\n"))
        #expect(setsOnTarget("O_DIRECT", calls) == mode.1, story)
        // qemu-img flushes after each write; O_DSYNC or O_SYNC has an equal effect in the kernel.
        let flushes = calls.contains { $0.contains("sync(") }
        let synchronous = setsOnTarget("O_DSYNC", calls) || setsOnTarget("O_SYNC", calls)
        #expect(synchronous || !mode.2 || flushes, story)
        // Every mode except unsafe, the default, promises stable storage when swimg reports
        // success.
        #expect((flushes || synchronous) == (mode.0 != "unsafe"), story)
    }

    @Test func defaultModeNeverFlushes() throws {
        let calls = try trace("-O qcow2")
        #expect(
            !calls.contains { $0.contains("sync(") },
            Comment(rawValue: calls.joined(separator: "\n")))
    }

    @Test func lastCacheModeWins() throws {
        #expect(!setsOnTarget("O_DIRECT", try trace("-t none -t writeback -O raw")))
        #expect(setsOnTarget("O_DIRECT", try trace("-t writeback -t none -O raw")))
    }

    @Test(arguments: [("none", true), ("directsync", true), ("writeback", false)])
    func sourceIsOpenedAsAsked(_ mode: String, _ direct: Bool) throws {
        let calls = try trace("-T \(mode) -O raw")
        let reads = calls.contains { $0.contains("O_DIRECT") && $0.contains("source") }
        let later = calls.contains { $0.contains("F_SETFL") && $0.contains("O_DIRECT") }
        #expect((reads || later) == direct, Comment(rawValue: calls.joined(separator: "\n")))
    }
}
