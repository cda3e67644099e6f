import Foundation
import Glibc
import TestSupport
import Testing

/// The handling of the target's name.
@Suite struct TargetTests {
    let folder: TempFolder
    let sketch = DiskSketch("A1-b0+-C")

    init() throws {
        folder = try TempFolder()
        try sketch.writeRaw(folder.path("source"))
    }

    private static let hasXattrs: Bool = {
        guard hasProgram("setfattr"), hasProgram("setfacl"), let folder = try? TempFolder(),
            let file = try? folder.write("probe", [])
        else { return false }
        let tries = [
            ("setfattr", ["-n", "user.x", "-v", "1", file]), ("setfacl", ["-m", "u:7:r", file]),
        ]
        return tries.allSatisfy { (try? run($0.0, $0.1).isSuccess) ?? false }
    }()

    private func convertOver(_ target: String, _ options: String...) throws {
        let outcome = try Swimg.convert(
            options + ["-f", "raw", "-O", "raw", "source", target], in: folder.path)
        expectSuccess(outcome)
        #expect(try mismatch(contents(folder.path(target)), sketch.bytes) == nil, "\(outcome)")
    }

    @Test func newTargetHasTheModeThatUmaskLeaves() throws {
        let outcome = try run(
            "sh", ["-c", "umask 027; \"$0\" convert -f raw source target", Swimg.path],
            in: folder.path)
        expectSuccess(outcome)
        #expect(FileStatus(folder.path("target"))?.mode == S_IFREG | 0o640)
    }

    @Test(arguments: [0o600, 0o640, 0o664, 0o755, 0o2644] as [mode_t])
    func existingTargetKeepsItsMode(_ mode: mode_t) throws {
        _ = try folder.write("target", noise(1, 3_000_000))
        chmod(folder.path("target"), mode)
        try convertOver("target")
        #expect(FileStatus(folder.path("target"))?.mode == S_IFREG | mode)
        #expect(folder.names == ["source", "target"])
    }

    @Test(.enabled(if: isRoot, "changing a file's owner needs root"))
    func existingTargetKeepsItsOwner() throws {
        _ = try folder.write("target", [1, 2, 3])
        chown(folder.path("target"), 1234, 5678)
        chmod(folder.path("target"), 0o4640)
        let before = try #require(FileStatus(folder.path("target")))
        try convertOver("target")
        let after = try #require(FileStatus(folder.path("target")))
        #expect(after.owner == 1234 && after.group == 5678)
        #expect(after.mode & 0o777 == before.mode & 0o777)
    }

    @Test(.enabled(if: hasXattrs, "needs setfattr, setfacl and a file system that keeps both"))
    func existingTargetKeepsAttributesAndACL() throws {
        let target = try folder.write("target", noise(2, 100_000))
        try require("setfattr", ["-n", "user.origin", "-v", "backup 7", target])
        try require("setfattr", ["-n", "user.empty", target])
        try require("setfacl", ["-m", "u:1234:rw,g:99:r,m::rw", target])
        let attributes = try require("getfattr", ["-d", "--absolute-names", target])
        let access = try require("getfacl", ["-n", "--absolute-names", target])
        try convertOver("target")
        #expect(try require("getfattr", ["-d", "--absolute-names", target]) == attributes)
        #expect(try require("getfacl", ["-n", "--absolute-names", target]) == access)
    }

    @Test(.enabled(if: hasXattrs, "needs setfacl and a file system that keeps ACLs"))
    func newTargetTakesTheFoldersDefaultACL() throws {
        try require("setfacl", ["-d", "-m", "u:1234:rw,o::-", folder.path])
        try convertOver("target")
        let access = try require("getfacl", ["-nE", "--absolute-names", folder.path("target")])
        #expect(access.contains("\nuser:1234:rw-\n") && access.contains("\nother::---\n"))
    }

    @Test func symbolicLinkStaysOne() throws {
        let inner = try folder.makeFolder("inner")
        let real = try folder.write("inner/real", [9])
        try FileManager.default.createSymbolicLink(
            atPath: folder.path("target"), withDestinationPath: "inner/real")
        try convertOver("target")
        #expect(
            FileStatus(folder.path("target"), followLinks: false)?.mode ?? 0 & S_IFMT != S_IFREG)
        #expect(
            try FileManager.default.destinationOfSymbolicLink(atPath: folder.path("target"))
                == "inner/real")
        #expect(try mismatch(contents(real), sketch.bytes) == nil)
        #expect(TempFolder.names(in: inner) == ["real"] && folder.names.count == 3)
    }

    @Test func danglingSymbolicLinkIsFilled() throws {
        try FileManager.default.createSymbolicLink(
            atPath: folder.path("target"), withDestinationPath: "real")
        try convertOver("target")
        #expect(try mismatch(contents(folder.path("real")), sketch.bytes) == nil)
        #expect(folder.names == ["real", "source", "target"])
        #expect(
            try FileManager.default.destinationOfSymbolicLink(atPath: folder.path("target"))
                == "real")
    }

    @Test func allHardLinksSeeTheNewContent() throws {
        let target = try folder.write("target", noise(4, 2_000_000))
        #expect(link(target, folder.path("other")) == 0)
        let inode = FileStatus(target)?.inode
        try convertOver("target")
        #expect(
            FileStatus(target)?.inode == inode && FileStatus(folder.path("other"))?.inode == inode)
        #expect(try mismatch(contents(folder.path("other")), sketch.bytes) == nil)
        #expect(folder.names == ["other", "source", "target"])
    }

    @Test func longerOldTargetIsCut() throws {
        try writeFilled(folder.path("target"), byte: 0xaa, count: sketch.size * 3)
        try convertOver("target")
        #expect(FileStatus(folder.path("target"))?.size == Int64(sketch.size))
    }

    @Test(arguments: [
        "source", "./source", "link", "hard", "linked-folder/source",
    ])
    func refusesTheSourceAsTarget(_ name: String) throws {
        try FileManager.default.createSymbolicLink(
            atPath: folder.path("link"), withDestinationPath: "source")
        #expect(link(folder.path("source"), folder.path("hard")) == 0)
        try FileManager.default.createSymbolicLink(
            atPath: folder.path("linked-folder"), withDestinationPath: ".")
        let before = folder.names
        for options in [
            ["-O", "raw"], ["-O", "qcow2"], ["-n", "-O", "raw"], ["-O", "raw", "-W"],
        ] {
            let outcome = try Swimg.convert(
                options + ["-f", "raw", "source", name], in: folder.path)
            #expect(outcome.status == 1 && !outcome.errors.isEmpty, "\(outcome)")
            expectOneErrorLine(outcome, says: name)
            #expect(
                try mismatch(contents(folder.path("source")), sketch.bytes) == nil, "\(outcome)")
            #expect(folder.names == before, "\(outcome)")
        }
        let second = try Swimg.convert("-f", "raw", "other", "source", name, in: folder.path)
        #expect(second.status == 1 && folder.names == before, "\(second)")
    }

    @Test func refusesTheBackingFileAsTarget() throws {
        let below = try Fixture.folderOfImages()
        for name in ["below-24k.raw", "overlay-equal.qcow2", "overlay-longer.qcow2"] {
            try FileManager.default.copyItem(atPath: "\(below)/\(name)", toPath: folder.path(name))
        }
        let before = try contents(folder.path("below-24k.raw"))
        for options in [["-O", "raw"], ["-O", "qcow2"], ["-n", "-O", "raw"]] {
            let outcome = try Swimg.convert(
                options + ["-f", "qcow2", "overlay-equal.qcow2", "below-24k.raw"], in: folder.path)
            expectRefusal(outcome, says: "below-24k.raw")
            #expect(
                try mismatch(contents(folder.path("below-24k.raw")), before) == nil, "\(outcome)")
        }
    }

    /// `-B` names a file that the new image will read from, so it cannot be the target itself.
    @Test func refusesTheNewBackingFileAsTarget() throws {
        try sketch.writeRaw(folder.path("base"))
        let outcome = try Swimg.convert(
            "-f", "raw", "-O", "qcow2", "-B", "base", "-F", "raw", "source", "base", in: folder.path
        )
        expectRefusal(outcome, says: "base")
        #expect(try mismatch(contents(folder.path("base")), sketch.bytes) == nil)
    }

    @Test func folderIsNoTarget() throws {
        _ = try folder.makeFolder("target")
        expectRefusal(try Swimg.convert("source", "target", in: folder.path), says: "target")
        #expect(folder.names == ["source", "target"])
    }

    @Test func folderIsNoSource() throws {
        _ = try folder.makeFolder("from")
        for options in [["-f", "raw"], []] {
            expectRefusal(
                try Swimg.convert(options + ["from", "target"], in: folder.path), says: "from")
            #expect(folder.names == ["from", "source"])
        }
    }

    /// `convert` reads and writes a FIFO in one pass (PipeSourceTests, PipeTargetTests); all other
    /// verbs need a file, and must not wait for a program at the other end.
    @Test func fifoIsNoImage() throws {
        #expect(mkfifo(folder.path("pipe"), 0o644) == 0)
        for verb in [["info"], ["map"], ["check"], ["measure"], ["resize", "-f", "raw"]] {
            let size = verb[0] == "resize" ? ["1M"] : []
            let outcome = try run(Swimg.path, verb + [folder.path("pipe")] + size, timeout: 5)
            #expect(outcome.status == 1 && outcome.errorText.contains("pipe"), "\(outcome)")
        }
        #expect(folder.names == ["pipe", "source"])
    }

    @Test(.enabled(if: !isRoot, "root may read and write everything"))
    func saysWhatItMayNotOpen() throws {
        chmod(folder.path("source"), 0)
        expectRefusal(try Swimg.convert("source", "target", in: folder.path), says: "source")
        chmod(folder.path("source"), 0o600)
        _ = try folder.makeFolder("closed")
        chmod(folder.path("closed"), 0o500)
        expectRefusal(try Swimg.convert("source", "closed/target", in: folder.path), says: "closed")
    }

    /// A writable file in a folder without write permission is written in place.
    @Test(.enabled(if: !isRoot, "root may write to every folder"))
    func writesInPlaceWhereItMayNotCreate() throws {
        _ = try folder.makeFolder("closed")
        _ = try folder.write("closed/target", [1])
        chmod(folder.path("closed"), 0o500)
        try convertOver("closed/target")
        chmod(folder.path("closed"), 0o700)
    }
}
