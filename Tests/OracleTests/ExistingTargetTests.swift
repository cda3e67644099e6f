import Foundation
import TestSupport
import Testing

/// `-n` into an existing target, which keeps its tail.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct ExistingTargetTests {
    static let modes = ["", "-W", "-m 1", "-S 0", "-S 64k -m 3", "-t none", "-t writethrough -W"]
    static let sources = ["raw-sparse", "zeros-written", "v2-512", "zstd-4k", "chain-extended"]

    private func convert(_ name: String, _ mode: String, _ rest: String...) throws -> Outcome {
        let source = try SourceGallery.named(name)
        return try Swimg.convert(
            mode.words + ["-n", "-f", source.format] + rest.dropLast()
                + [source.path, rest.last ?? ""])
    }

    @Test(arguments: some(of: modes, with: sources))
    func rawFileOfTheSameSize(_ mode: String, _ name: String) throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        try writeFilled(target, byte: 0xaa, count: SourceGallery.content.count)
        let inode = FileStatus(target)?.inode
        let outcome = try convert(name, mode, "-O", "raw", target)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try mismatch(contents(target), SourceGallery.content) == nil, "\(outcome)")
        #expect(FileStatus(target)?.inode == inode && folder.names == ["target"], "\(outcome)")
    }

    /// A file that is full of data gives back what is zero.
    @Test(arguments: some(of: modes, with: sources))
    func zerosTakeNoSpace(_ mode: String, _ name: String) throws {
        let folder = try TempFolder()
        let source = try SourceGallery.named(name)
        let line = ["-n", "-f", source.format, "-O", "raw", source.path]
        for target in ["own", "theirs"] {
            try writeFilled(folder.path(target), byte: 0xaa, count: SourceGallery.content.count)
        }
        let outcome = try Swimg.convert(mode.words + line + [folder.path("own")])
        #expect(outcome.isSuccess, "\(outcome)")
        try require("qemu-img", ["convert"] + mode.words + line + [folder.path("theirs")])
        try require("sync", ["-f", folder.path])
        let own = try #require(FileStatus(folder.path("own"))).allocated
        let theirs = try #require(FileStatus(folder.path("theirs"))).allocated
        #expect(own <= theirs + 8192, "\(own), \(theirs): \(outcome)")
    }

    @Test(arguments: modes, [1, 512, 70000, 1 << 20])
    func tailOfALargerRawFileStays(_ mode: String, _ extra: Int) throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        let size = SourceGallery.content.count
        try writeFilled(target, byte: 0xaa, count: size + extra)
        let outcome = try convert("v3-4k", mode, "-O", "raw", target)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        let bytes = [UInt8](try contents(target))
        #expect(mismatch(bytes.prefix(size), SourceGallery.content) == nil, "\(outcome)")
        #expect(
            bytes.dropFirst(size).allSatisfy { $0 == 0xaa } && bytes.count == size + extra,
            "\(outcome)")
    }

    /// Targets of the source's odd size and others within its last sector: trailing zeros need no
    /// space in the target.
    @Test(
        arguments: some(
            of: [1_000_001, 999_937, 1_000_447], with: ["", "-W", "-S 0", "-t none", "--no-clone"]))
    func rawFileThatEndsWithinTheLastSector(_ size: Int, _ mode: String) throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        for (source, kept) in try makeOddSources(folder) {
            try writeFilled(target, byte: 0xaa, count: size)
            let words = mode.words + ["-n", "-f", source == "odd.raw" ? "raw" : "qcow2"]
            let outcome = try Swimg.convert(
                words + ["--digest", "-O", "raw", source, target], in: folder.path)
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
            let format = source == "odd.raw" ? "raw" : "qcow2"
            let difference = try Qemu.difference(target, "raw", folder.path(source), format)
            #expect(difference == nil, "\(outcome)")
            #expect(FileStatus(target)?.size == Int64(size < kept ? 1_000_448 : size), "\(outcome)")
            // The digest covers the whole disk.
            try Qemu.img(
                "convert", "-f", format, "-O", "raw", source, "whole", in: folder.path)
            let sum = try blkhash(folder.path("whole"))
            #expect(outcome.outputText.hasPrefix(sum), "\(outcome)")
        }
        for size in [999_936, 999_000] {
            try writeFilled(target, byte: 0xaa, count: size)
            let refused = try Swimg.convert(
                "-n", "-f", "raw", "-O", "raw", "odd.raw", target, in: folder.path)
            #expect(refused.status == 1 && refused.errorText.contains("smaller"), "\(refused)")
            #expect(FileStatus(target)?.size == Int64(size))
        }
    }

    /// An export cannot grow: trailing zeros need no space in it, other data is refused.
    @Test(
        .enabled(if: NBDTestServer.isInstalled, "needs nbdkit"), arguments: [1_000_001, 999_937])
    func exportThatEndsWithinTheLastSector(_ size: Int) throws {
        let folder = try TempFolder()
        for (source, kept) in try makeOddSources(folder) {
            let backing = folder.path("export")
            try writeFilled(backing, byte: 0xaa, count: size)
            let server = try NBDTestServer.nbdkit("file", backing)
            let format = source == "odd.raw" ? "raw" : "qcow2"
            let outcome = try Swimg.convert(
                "-n", "-f", format, "-O", "raw", source, server.uri, in: folder.path)
            server.stop()
            guard size >= kept else {
                #expect(outcome.status == 1 && outcome.errorText.contains("smaller"), "\(outcome)")
                continue
            }
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
            #expect(
                try Qemu.difference(backing, "raw", folder.path(source), format) == nil,
                "\(outcome)")
        }
        // One export as source and target.
        let backing = folder.path("export")
        try writeFilled(backing, byte: 7, count: size)
        let server = try NBDTestServer.nbdkit("file", backing)
        let outcome = try Swimg.convert("-n", "-f", "raw", "-O", "raw", server.uri, server.uri)
        server.stop()
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(
            try mismatch(contents(backing), Data(repeating: 7, count: size)) == nil, "\(outcome)")
    }

    /// Disks of 1,000,448 bytes after padding; `kept` is the number of bytes before the trailing
    /// zeros.
    private func makeOddSources(_ folder: TempFolder) throws -> [(name: String, kept: Int)] {
        try writeNoise(folder.path("odd.raw"), count: 1_000_001)
        for (name, end) in [("full.qcow2", 1_000_448), ("half.qcow2", 512 << 10)] {
            try Qemu.img("create", "-q", "-f", "qcow2", folder.path(name), "1000448")
            try Qemu.io("qcow2", folder.path(name), ["write -P 7 0 \(end)"])
        }
        return [("odd.raw", 1_000_001), ("full.qcow2", 1_000_448), ("half.qcow2", 512 << 10)]
    }

    @Test func smallerRawFileIsRefusedUntouched() throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        try writeFilled(target, byte: 0xaa, count: 65536)
        let outcome = try convert("v3-4k", "", "-O", "raw", target)
        #expect(outcome.status == 1, "\(outcome)")
        #expect(
            try mismatch(contents(target), Data(repeating: 0xaa, count: 65536)) == nil, "\(outcome)"
        )
    }

    @Test(.enabled(if: hasProgram("setfattr"), "needs setfattr"))
    func targetIsZeroIsBelievedInAFile() throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        let sketch = DiskSketch("A--1-0B-")
        try sketch.writeRaw(folder.path("source"))
        try writeFilled(target, byte: 0xaa, count: sketch.size)
        let outcome = try Swimg.convert(
            "-n", "--target-is-zero", "-f", "raw", "-O", "raw", folder.path("source"), target)
        #expect(outcome.isSuccess, "\(outcome)")
        let bytes = [UInt8](try contents(target))
        #expect(bytes[65536..<3 * 65536].allSatisfy { $0 == 0xaa }, "\(outcome)")
        #expect(mismatch(bytes.prefix(65536), sketch.bytes.prefix(65536)) == nil, "\(outcome)")
    }
}
