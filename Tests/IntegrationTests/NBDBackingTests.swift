import Foundation
import TestSupport
import Testing

/// Images with a backing file on an NBD export or in a `json:{…}` name. swimg reads them as
/// qemu-img does and never starts a program because an image names one.
@Suite(.enabled(if: Qemu.isInstalled && NBDTestServer.isInstalled, "needs nbdkit and qemu-nbd"))
struct NBDBackingTests {
    private let folder: TempFolder

    init() throws {
        folder = try TempFolder()
        try DiskSketch("A1b0+-CC", cluster: 65536).writeRaw(folder.path("base.raw"))
        try Qemu.img("convert", "-O", "qcow2", "base.raw", "base.qcow2", in: folder.path)
    }

    /// Makes a 4 MiB overlay with one cluster over the base's data and one after the base's end.
    private func makeOverlay(_ backing: String, _ format: String, name: String = "over") throws {
        try Qemu.img(
            "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, name, "4M",
            in: folder.path)
        try require(
            "qemu-io",
            [
                "-f", "qcow2", "-c", "write -P 9 64k 64k", "-c", "write -P 8 2M 64k",
                folder.path(name),
            ], in: folder.path)
    }

    private func expectAsQemu(_ name: String = "over") throws {
        for words in [
            ["info", "--backing-chain"], ["info", "--backing-chain", "--output=json"], ["map"],
            ["map", "--output=json"],
        ] {
            let theirs = try run("qemu-img", words + [name], in: folder.path)
            let outcome = try run(Swimg.path, words + [name], in: folder.path)
            #expect(theirs.isSuccess && outcome.isSuccess, "\(outcome)")
            #expect(withoutChildren(outcome.outputText) == theirs.outputText, "\(words)")
        }
        expectSuccess(try Swimg.convert("-O", "raw", name, "own", in: folder.path))
        try Qemu.img("compare", "-f", "qcow2", "-F", "raw", name, "own", in: folder.path)
        let same = try run(Swimg.path, ["compare", name, "own"], in: folder.path)
        #expect(same.isSuccess, "\(same)")
    }

    @Test func anImageOnAnExport() throws {
        let server = try NBDTestServer.qemu("-r", "-f", "raw", folder.path("base.raw"))
        for name in [server.uri, "nbd:unix:\(server.socket)"] {
            try makeOverlay(name, "raw")
            try expectAsQemu()
        }
    }

    /// The image on the server has a backing file on another server.
    @Test func aChainThatGoesOnBehindAnExport() throws {
        let base = try NBDTestServer.qemu("-r", "-f", "raw", folder.path("base.raw"))
        try makeOverlay(base.uri, "raw", name: "middle")
        let middle = try NBDTestServer.nbdkit("-r", "file", folder.path("middle"))
        try makeOverlay(middle.uri, "qcow2")
        try expectAsQemu()
    }

    static let descriptions = [
        #"json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}"#,
        #"json:{"driver":"qcow2","file.filename":"base.qcow2"}"#,
        #"json:{"file":{"driver":"file","filename":"base.qcow2"}}"#,
        #"json:{"driver":"qcow2","file":{"driver":"nbd","server":{"type":"unix","path":"SOCKET"}}}"#,
    ]

    @Test(arguments: descriptions)
    func anImageThatDescribesItsBackingFile(_ description: String) throws {
        let server = try NBDTestServer.nbdkit("-r", "file", folder.path("base.qcow2"))
        let name = description.replacing("SOCKET", with: server.socket)
        try makeOverlay(name, "qcow2")
        // swimg must print names as qemu-img does: for a file, the name in the description; for an
        // export's socket, another form of that name.
        expectSuccess(try Swimg.convert("-O", "raw", "over", "own", in: folder.path))
        try Qemu.img("compare", "-f", "qcow2", "-F", "raw", "over", "own", in: folder.path)
        try expectAsQemu()
    }

    @Test func aTargetOnAnExport() throws {
        let server = try NBDTestServer.qemu("-r", "-f", "raw", folder.path("base.raw"))
        try makeOverlay(server.uri, "raw")
        let outcome = try Swimg.convert(
            "-O", "qcow2", "-B", server.uri, "-F", "raw", "over", "own", in: folder.path)
        expectSuccess(outcome)
        try Qemu.img("compare", "-f", "qcow2", "-F", "qcow2", "over", "own", in: folder.path)
        let small = try #require(FileStatus(folder.path("own"))).size
        #expect(small < 1 << 20, "it holds what the base has: \(small)")
    }

    /// Names that are valid on the command line but not in an image.
    @Test(arguments: [
        "[\u{1f}touch\u{1f}started", "nbd:[\u{1f}touch\u{1f}started",
        "image-opts:\u{1f}file.filename=base.raw",
        #"json:{"file.filename":"[\u001ftouch\u001fstarted"}"#,
        #"json:{"driver":"raw","file.filename":"[\u001ftouch\u001fstarted"}"#,
        #"json:{"file.filename":"json:{}"}"#, "json:{", "ssh://host/x",
        "nbds://localhost/?tls-verify-peer=false",
        #"json:{"file.filename":"nbds://localhost/?tls-verify-peer=false"}"#,
        #"json:{"driver":"ssh","host":"x","path":"y"}"#,
    ])
    func anImageStartsNothing(_ backing: String) throws {
        try makeOverlay("base.raw", "raw")
        try Qemu.img("rebase", "-u", "-b", backing, "-F", "raw", "over", in: folder.path)
        for words in [
            ["convert", "-O", "raw", "over", "own"], ["info", "--backing-chain", "over"],
            ["map", "over"], ["compare", "over", "over"], ["digest", "over"],
            ["resize", "over", "8M"],
        ] {
            let outcome = try run(Swimg.path, words, in: folder.path)
            expectRefusal(outcome, status: words[0] == "compare" ? 2 : 1)
            #expect(outcome.errorText.contains("over"), "it says whose backing file: \(outcome)")
            #expect(!folder.names.contains("started") && !folder.names.contains("own"))
        }
    }

    /// Detects the loop even though the export hides that it is the same image.
    @Test func aChainThatBitesItsTail() throws {
        let image = folder.path("over")
        try makeOverlay("base.raw", "raw")
        let server = try NBDTestServer.nbdkit("-r", "file", image)
        try Qemu.img("rebase", "-u", "-b", server.uri, "-F", "qcow2", "over", in: folder.path)
        for words in [
            ["convert", "-O", "raw", "over", "own"], ["info", "--backing-chain", "over"],
        ] {
            expectRefusal(
                try run(Swimg.path, words, in: folder.path), says: "leads back to this file")
        }
    }
}
