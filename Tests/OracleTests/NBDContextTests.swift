import Foundation
import TestSupport
import Testing

/// `x-dirty-bitmap` shows another metadata context of an export than that of holes.
@Suite(.enabled(if: Qemu.isInstalled && NBDTestServer.isInstalled, "needs nbdkit and qemu-nbd"))
struct NBDContextTests {
    private let folder: TempFolder
    private var image: String { folder.path("image") }

    init() throws {
        folder = try TempFolder()
        try writeNoise(folder.path("base"), count: 4 << 20)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "image", "4M",
            in: folder.path)
        try Qemu.io("qcow2", image, ["write -P 1 1M 1M", "write -z 3M 256k"])
        try Qemu.img("bitmap", "--add", "-g", "512", image, "fine")
        try Qemu.img("bitmap", "--add", "-g", "64k", image, "coarse")
        try Qemu.io("qcow2", image, ["write -P 2 3k 512", "write -P 3 2M 2M"])
    }

    private static let contexts = [
        "qemu:dirty-bitmap:fine", "qemu:dirty-bitmap:coarse", "qemu:allocation-depth",
        "base:allocation",
    ]

    /// Starts qemu-nbd with a bitmap or with depths.
    private func serve(_ context: String) throws -> NBDTestServer {
        let options =
            context.hasPrefix("qemu:dirty") ? ["-B", String(context.dropFirst(18))] : ["-A"]
        return try options.count == 2
            ? NBDTestServer.qemu("-r", "-f", "qcow2", options[0], options[1], image)
            : NBDTestServer.qemu("-r", "-f", "qcow2", options[0], image)
    }

    @Test(arguments: contexts)
    func mapsLikeQemu(_ context: String) throws {
        let server = try serve(context)
        let place = "driver=nbd,server.type=unix,server.path=\(server.socket)"
        let described =
            #"json:{"driver":"raw","file":{"driver":"nbd","path":"\#(server.socket)","#
            + #""x-dirty-bitmap":"\#(context)"}}"#
        for name in [["--image-opts", "\(place),x-dirty-bitmap=\(context)"], [described]] {
            for options in [
                ["--output=json"], ["--output=human"], ["--output=json", "--max-length=12345"],
                ["--output=json", "--start-offset=12345"],
            ] {
                let other = try run("qemu-img", ["map"] + options + name)
                let outcome = try run(Swimg.path, ["map"] + options + name)
                #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
                #expect(outcome.outputText == other.outputText, "\(outcome)\n\(other)")
            }
        }
    }

    /// Whatever the context says, the disk is what the server reads.
    @Test(arguments: contexts)
    func theDiskIsTheSame(_ context: String) throws {
        let server = try serve(context)
        let name =
            "driver=nbd,server.type=unix,server.path=\(server.socket),x-dirty-bitmap=\(context)"
        let target = folder.path("target")
        let outcome = try Swimg.convert("--image-opts", name, target)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try Qemu.difference(image, "qcow2", target, "raw") == nil)
        #expect(
            try run(
                Swimg.path, ["compare", "--image-opts", name, "driver=raw,file.filename=\(target)"]
            )
            .isSuccess)
    }

    @Test(arguments: ["qemu:dirty-bitmap:none", "fine", "x:y"])
    func aMissingContextIsAnError(_ context: String) throws {
        let server = try serve("qemu:dirty-bitmap:fine")
        let name =
            "driver=nbd,server.type=unix,server.path=\(server.socket),x-dirty-bitmap=\(context)"
        let outcome = try run(Swimg.path, ["map", "--image-opts", name])
        #expect(outcome.status == 1, "\(outcome)")
        #expect(
            outcome.errorText.contains("requested x-dirty-bitmap \(context) not found"),
            "\(outcome)")
    }
}
