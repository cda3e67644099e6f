import Foundation
import Glibc
import TestSupport
import Testing

/// Ways to name and reach exports: server commands, descriptions, TLS.
@Suite(.enabled(if: Qemu.isInstalled && NBDTestServer.isInstalled, "needs nbdkit and qemu-nbd"))
struct NBDNamingTests {
    private let folder: TempFolder

    init() throws { folder = try TempFolder() }

    @Test func serversInBracketsAreStarted() throws {
        let source = try SourceGallery.named("raw-sparse")
        let target = folder.path("target")
        var outcome = try Swimg.convert(
            "-f", "raw", "[", "nbdkit", "-r", "file", source.path, "]", "-O", "raw", target)
        try expectContent(target, outcome)
        let image = folder.path("image")
        try Qemu.img("create", "-q", "-f", "qcow2", image, "64M")
        outcome = try Swimg.convert(
            "-n", "-f", "raw", "-O", "raw", source.path, "[", "qemu-nbd", "-f", "qcow2", image, "]")
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try Qemu.damage(image) == nil)
        let bytes = folder.path("bytes")
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", image, bytes)
        let result = try #require(FileManager.default.contents(atPath: bytes))
        let count = SourceGallery.content.count
        #expect(mismatch(result.prefix(count), SourceGallery.content) == nil)
        #expect(result.dropFirst(count).allSatisfy { $0 == 0 })
    }

    @Test(.enabled(if: hasProgram("setpriv"), "needs setpriv"))
    func aServerEndsWithAKilledProgram() throws {
        let mark = folder.path("pid")
        let process = try RunningProcess(
            Swimg.path,
            [
                "convert", "[", "nbdkit", "-P", mark, "--filter=delay", "pattern", "1G", "rdelay=1",
                "]",
            ]
                + [folder.path("target")],
            // A killed program leaves the folder of its socket.
            environment: ["TMPDIR": folder.path])
        // The file exists before its content does.
        var text = ""
        #expect(
            process.wait(until: {
                text = (try? String(contentsOfFile: mark, encoding: .utf8)) ?? ""
                return text.hasSuffix("\n")
            }))
        let server = try #require(pid_t(text.trimmingCharacters(in: .whitespacesAndNewlines)))
        #expect(Glibc.kill(server, 0) == 0)
        process.kill()
        _ = try process.wait()
        for _ in 0..<200 where Glibc.kill(server, 0) == 0 { usleep(50_000) }
        #expect(Glibc.kill(server, 0) != 0, "the server still runs")
    }

    @Test(arguments: [["nbdkit", "no-such-plugin"], ["/no/such/program"], ["true"]])
    func aServerThatDoesNotStartIsNamed(_ words: [String]) throws {
        let outcome = try Swimg.convert(
            ["-f", "raw", "["] + words + ["]", folder.path("target")], timeout: 20)
        #expect(outcome.status == 1)
        #expect(outcome.errorText.contains("the server ended with status"), "\(outcome)")
    }

    @Test func bracketsMustClose() throws {
        let outcome = try Swimg.convert("[", "nbdkit", "memory", "1M", folder.path("target"))
        #expect(outcome.status == 1)
        #expect(outcome.errorText.contains("no closing"), "\(outcome)")
    }

    /// The disk's content is the name of the requested export.
    @Test(arguments: [
        ["-f", "raw", "nbd+unix:///EXPORT?socket=SOCKET"],
        ["-f", "raw", "nbd:unix:SOCKET:exportname=EXPORT"],
        [
            #"json:{"driver":"raw","file":{"driver":"nbd","export":"EXPORT","#
                + #""server":{"type":"unix","path":"SOCKET"}}}"#
        ],
        [#"json:{"driver":"raw","file.driver":"nbd","file.path":"SOCKET","file.export":"EXPORT"}"#],
        [
            "--image-opts",
            "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=SOCKET,file.export=EXPORT",
        ],
        [
            "--image-opts",
            "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=SOCKET,"
                + "file.server.abstract=off,file.export=EXPORT,file.reconnect-delay=1",
        ],
    ])
    func asksForTheExportThatIsNamed(_ name: [String]) throws {
        let server = try NBDTestServer.nbdkit("info", "mode=exportname")
        let target = folder.path("target")
        let arguments = name.map {
            $0.replacing("SOCKET", with: server.socket).replacing("EXPORT", with: "some-disk")
        }
        let outcome = try Swimg.convert(arguments + ["-O", "raw", target])
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        let theirs = folder.path("theirs")
        try require("qemu-img", ["convert", "-O", "raw"] + arguments + [theirs])
        let bytes = try #require(FileManager.default.contents(atPath: target))
        #expect(String(decoding: bytes.prefix(9), as: UTF8.self) == "some-disk")
        #expect(try bytes == Data(contentsOf: URL(fileURLWithPath: theirs)))
    }

    /// A target described by `--target-image-opts`.
    @Test(arguments: ["raw", "qcow2"])
    func writesToADescribedExport(_ format: String) throws {
        let source = try SourceGallery.named("v3-64k")
        let server = try NBDTestServer.nbdkit("memory", "64M")
        try require("qemu-img", ["create", "-q", "-f", format, server.uri, "33M"])
        let size = try require(Swimg.path, ["info", "-f", format, server.uri])
        #expect(size.contains("virtual size: \(format == "raw" ? 64 : 33) MiB"))
        let outcome = try Swimg.convert(
            "-n", "--target-image-opts", source.path,
            "driver=\(format),file.driver=nbd,file.server.type=unix,file.server.path=\(server.socket)"
        )
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try Qemu.difference(source.path, source.format, server.uri, format) == nil)
    }
}
