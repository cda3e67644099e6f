import Foundation
import TestSupport
import Testing

/// Overlays of disks that a running machine writes to, as in every external snapshot.
@Suite(
    .enabled(
        if: Qemu.isInstalled && hasProgram("qemu-nbd"), "a running qemu-nbd holds the locks"))
struct DiskInUseTests {
    let folder: TempFolder

    init() throws {
        folder = try TempFolder()
        try DiskSketch("A1b-0C").writeRaw(folder.path("base.raw"))
        try DiskSketch("A1b-0C").writeQcow2(folder.path("base.qcow2"))
        for format in ["raw", "qcow2"] {
            try Qemu.img(
                "create", "-q", "-f", "qcow2", "-b", "base.\(format)", "-F", format,
                "over.\(format)", in: folder.path)
        }
    }

    /// The file in use and the backing file to use.
    static let cases = [
        ("base.raw", "base.raw"), ("base.qcow2", "base.qcow2"), ("base.raw", "over.raw"),
        ("base.qcow2", "over.qcow2"), ("over.qcow2", "over.qcow2"),
    ]

    private func format(_ name: String) -> String { name == "base.raw" ? "raw" : "qcow2" }

    private func use(_ name: String) throws -> NBDTestServer {
        let server = try NBDTestServer.qemu("-f", format(name), folder.path(name))
        // Reading is refused because the disk is in use.
        let refused = try run(Swimg.path, ["digest", name], in: folder.path)
        #expect(refused.status == 1 && refused.errorText.contains("lock"), "\(refused)")
        return server
    }

    @Test(arguments: cases)
    func createTakesNoLock(_ busy: String, _ base: String) throws {
        let server = try use(busy)
        let form = format(base)
        for words in [
            ["-b", base, "-F", form, "new"], ["-b", base, "-F", form, "new", "8M"],
            ["-o", "backing_file=\(base),backing_fmt=\(form)", "new"],
        ] {
            let line = ["create", "-f", "qcow2"] + words
            let theirs = try run("qemu-img", line, in: folder.path)
            let ours = try run(Swimg.path, line, in: folder.path)
            #expect(theirs.isSuccess && ours.isSuccess && ours.errors.isEmpty, "\(ours)\n\(theirs)")
            #expect(ours.outputText == theirs.outputText)
        }
        server.stop()
        #expect(
            try Qemu.img("compare", "new", base, in: folder.path).contains("identical"))
    }

    @Test(arguments: cases)
    func convertTakesNoLock(_ busy: String, _ base: String) throws {
        try DiskSketch("--9A-0").writeQcow2(folder.path("source"))
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", base, "-F", format(base), "there",
            in: folder.path)
        let server = try use(busy)
        for words in [
            ["-B", base, "-F", format(base), "source", "own"],
            ["-o", "backing_file=\(base),backing_fmt=\(format(base))", "source", "optional"],
            ["-n", "-B", base, "-F", format(base), "source", "there"],
        ] {
            let outcome = try Swimg.convert(["-O", "qcow2"] + words, in: folder.path)
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        }
        server.stop()
        for name in ["own", "optional", "there"] {
            let path = folder.path(name)
            #expect(try Qemu.difference(path, "qcow2", folder.path("source"), "qcow2") == nil)
            #expect(try Qemu.damage(path) == nil)
        }
    }
}
