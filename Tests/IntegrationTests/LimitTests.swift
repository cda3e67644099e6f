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

    /// 1 is an answer of `compare`.
    private static func failure(of line: String) -> Int32 { line.hasPrefix("compare") ? 2 : 1 }

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
        #expect(none.status == Self.failure(of: line) && none.output.isEmpty, "\(none)")
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
        for kilobytes in stride(from: Self.leastMemory, through: 300_000, by: 12_000) {
            let outcome = try limited(kilobytes: kilobytes, line)
            guard !outcome.isSuccess else { continue }
            #expect(outcome.status == Self.failure(of: line), "\(kilobytes): \(outcome)")
            #expect(outcome.errorText.count(where: { $0 == "\n" }) == 1, "\(kilobytes): \(outcome)")
            #expect(FileStatus(folder.path("new")) == nil, "\(kilobytes): \(outcome)")
        }
    }

    /// The memory that the program takes to begin with is not ours to give: the loader, and Swift's
    /// runtime. In KiB.
    private static let leastMemory = 36_000

    private func limited(kilobytes: Int, _ line: String) throws -> Outcome {
        try run(
            "bash",
            ["-c", "ulimit -v \(kilobytes); exec \"$0\" \"$@\"", Swimg.path] + line.words,
            in: folder.path)
    }

    /// Memory that runs out over large tables: one line, and the image is what it was.
    @Test(
        .enabled(if: Qemu.isInstalled, "qemu-img makes the image"),
        arguments: [
            "check tables", "check -r all tables", "resize -q tables +1G",
            "resize -q --preallocation=metadata tables +64M", "resize -q --shrink tables 1M",
        ])
    func noMemoryForTables(_ line: String) throws {
        let made = "create -q -f qcow2 -o cluster_size=512,preallocation=metadata tables 256M"
        try require("qemu-img", made.words, in: folder.path)
        let tables = folder.path("tables")
        var failures = 0
        for kilobytes in stride(from: Self.leastMemory, through: 120_000, by: 4_000) {
            try require("cp", ["--sparse=always", tables, folder.path("copy")])
            let outcome = try limited(
                kilobytes: kilobytes, line.replacingOccurrences(of: "tables", with: "copy"))
            guard !outcome.isSuccess else { break }
            failures += 1
            #expect(outcome.status == 1, "\(kilobytes): \(outcome)")
            #expect(outcome.errorText.count(where: { $0 == "\n" }) == 1, "\(kilobytes): \(outcome)")
            try require("cmp", [tables, folder.path("copy")])
        }
        #expect(failures > 0)
    }
}
