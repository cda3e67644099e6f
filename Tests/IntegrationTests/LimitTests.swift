import Foundation
import TestSupport
import Testing

/// Limits of the system: one line and exit 1, or the work done with less.
@Suite struct LimitTests {
    let folder: TempFolder

    init() throws {
        folder = try TempFolder()
        #expect(chmod(folder.path, 0o777) == 0)
        try writeNoise(folder.path("disk.raw"), count: 3 << 20)
        try writeNoise(folder.path("image.raw"), count: 3 << 20)
        let outcome = try Swimg.convert(
            "-c", "-O", "qcow2", "disk.raw", "image.qcow2", in: folder.path)
        #expect(outcome.isSuccess, "\(outcome)")
        for name in folder.names { #expect(chmod(folder.path(name), 0o666) == 0) }
    }

    /// A line for each verb; each does its work where it may.
    static let verbs = [
        "convert -O raw image.qcow2 new", "convert -O qcow2 -c disk.raw new",
        "convert -O raw --digest disk.raw new", "create -f qcow2 new 1M", "info image.qcow2",
        "map image.qcow2", "check image.qcow2", "compare disk.raw image.qcow2",
        "measure -O qcow2 disk.raw", "dd if=disk.raw of=new bs=64k", "digest image.qcow2",
        "resize -f raw image.raw +1M",
    ]

    /// Root is exempt from the limit of processes, which counts those of one user: a user who runs
    /// nothing else runs the program.
    private func limited(_ processes: Int, user: Int32, _ line: String) throws -> Outcome {
        let script = "ulimit -u \(processes); exec \"$0\" \"$@\""
        // Its own folder may be closed to others. And it is `cp` that has the copy open for
        // writing, so that no other test's child inherits that.
        let program = folder.path("swimg")
        if FileStatus(program) == nil { try require("cp", [Swimg.path, program]) }
        let id = "\(user)"
        return try run(
            "setpriv",
            ["--reuid", id, "--regid", id, "--clear-groups", "bash", "-c", script, program]
                + line.words, in: folder.path)
    }

    @Test(
        .enabled(if: isRoot && hasProgram("setpriv"), "only root can become another user"),
        .serialized, arguments: verbs)
    func noThread(_ line: String) throws {
        let none = try limited(1, user: 100_000 + getpid(), line)
        #expect(none.status == 1 && none.output.isEmpty, "\(none)")
        #expect(
            none.errorText == "swimg: cannot start a thread: Resource temporarily unavailable\n",
            "\(none)")
        #expect(FileStatus(folder.path("new")) == nil)
        // One is enough.
        let one = try limited(2, user: 100_000 + getpid(), line)
        #expect(one.isSuccess && one.errors.isEmpty, "\(one)")
    }

    @Test(
        .enabled(
            if: isRoot && hasProgram("setpriv") && NBDTestServer.isInstalled, "needs root, nbdkit"))
    func noThreadForAServer() throws {
        let server = try NBDTestServer.nbdkit("memory", "4M")
        #expect(chmod(server.socket, 0o777) == 0)
        let parent = URL(fileURLWithPath: server.socket).deletingLastPathComponent().path
        #expect(chmod(parent, 0o777) == 0)
        for processes in 1...3 {
            let outcome = try limited(
                processes, user: 5_000_000 + getpid(), "convert -n -O raw disk.raw \(server.uri)")
            guard processes == 1 || !outcome.isSuccess else { continue }
            #expect(outcome.status == 1, "\(outcome)")
            #expect(outcome.errorText.contains("cannot start a thread"), "\(outcome)")
            #expect(outcome.errorText.count(where: { $0 == "\n" }) == 1, "\(outcome)")
        }
    }

    /// Memory that runs out anywhere: never a signal, never a wrong result.
    @Test(arguments: [
        "convert -c -O qcow2 -o cluster_size=2M -m 64 -W disk.raw new",
        "convert -c -O qcow2 -o compression_type=zstd,compression_level=19 -m 16 -W disk.raw new",
        "convert -O raw -m 64 -W disk.raw new", "convert -O raw -m 64 -W image.qcow2 new",
        "compare disk.raw image.qcow2", "digest image.qcow2",
    ])
    func noMemory(_ line: String) throws {
        // The memory that the program takes to begin with is not ours to give: the loader, and
        // Swift's runtime.
        for kilobytes in stride(from: 36_000, through: 300_000, by: 12_000) {
            let outcome = try run(
                "bash",
                ["-c", "ulimit -v \(kilobytes); exec \"$0\" \"$@\"", Swimg.path] + line.words,
                in: folder.path)
            guard !outcome.isSuccess else { continue }
            #expect(outcome.status == 1, "\(kilobytes): \(outcome)")
            #expect(outcome.errorText.count(where: { $0 == "\n" }) == 1, "\(kilobytes): \(outcome)")
            #expect(FileStatus(folder.path("new")) == nil, "\(kilobytes): \(outcome)")
        }
    }
}
