import Foundation
import TestSupport
import Testing

/// `-n`: into what is already there, keeping its tail.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct ExistingTargetTests {
    static let modes = ["", "-W", "-m 1", "-S 0", "-S 64k -m 3", "-t none", "-t writethrough -W"]
    static let sources = ["raw-sparse", "zeros-written", "v2-512", "zstd-4k", "chain-extended"]

    private func convert(_ name: String, _ mode: String, _ rest: String...) throws -> Outcome {
        let source = try SourceGallery.named(name)
        return try Swimg.convert(
            mode.words + ["-n", "-f", source.format] + rest.dropLast()
                + [source.path, rest.last ?? ""])
    }

    @Test(arguments: modes, sources)
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
