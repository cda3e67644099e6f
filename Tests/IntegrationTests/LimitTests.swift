import Foundation
import TestSupport
import Testing

/// System limits: swimg reports one line and exits with 1, or does the work with less.
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

    /// One command line for each verb; all succeed without limits.
    static let verbs = [
        "convert -O raw image.qcow2 new", "convert -O qcow2 -c disk.raw new",
        "convert -O raw --digest disk.raw new", "create -f qcow2 new 1M", "info image.qcow2",
        "map image.qcow2", "check image.qcow2", "compare disk.raw image.qcow2",
        "measure -O qcow2 disk.raw", "dd if=disk.raw of=new bs=64k", "digest image.qcow2",
        "resize -f raw image.raw +1M",
    ]

    /// `compare` exits with 2, because 1 means that the images differ.
    private static func failure(of line: String) -> Int32 { line.hasPrefix("compare") ? 2 : 1 }

    /// The process limit counts the processes of one user and does not apply to root, so a user
    /// without other processes runs the program.
    private func limited(_ processes: Int, user: Int32, _ line: String) throws -> Outcome {
        let script = "ulimit -u \(processes); exec \"$0\" \"$@\""
        // A copy, because the build folder may be inaccessible to that user. `cp` makes it, so that
        // no child of another test inherits a descriptor that is open for writing (ETXTBSY).
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
        // One thread besides the main thread is enough.
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

    /// Running out of memory anywhere must not cause a signal or a wrong result.
    @Test(arguments: [
        "convert -c -O qcow2 -o cluster_size=2M -m 64 -W disk.raw new",
        "convert -c -O qcow2 -o compression_type=zstd,compression_level=19 -m 16 -W disk.raw new",
        "convert -O raw -m 64 -W disk.raw new", "convert -O raw -m 64 -W image.qcow2 new",
        "compare disk.raw image.qcow2", "digest image.qcow2",
    ])
    func noMemory(_ line: String) throws {
        func succeeds(_ kilobytes: Int) throws -> Bool {
            unlink(folder.path("new"))
            let outcome = try limited(kilobytes: kilobytes, line)
            guard !outcome.isSuccess else { return true }
            #expect(outcome.status == Self.failure(of: line), "\(kilobytes): \(outcome)")
            #expect(outcome.errorText.count(where: { $0 == "\n" }) == 1, "\(kilobytes): \(outcome)")
            #expect(FileStatus(folder.path("new")) == nil, "\(kilobytes): \(outcome)")
            return false
        }
        let coarse = stride(from: Self.leastMemory, through: 300_000, by: 6_000)
        let enough = try #require(try coarse.first { try succeeds($0) })
        // Where a little more would do, even an array of a few KiB may get no memory.
        for kilobytes in stride(from: enough - 5_500, to: enough, by: 500) {
            _ = try succeeds(kilobytes)
        }
        for kilobytes in stride(from: enough, through: 300_000, by: 24_000) {
            _ = try succeeds(kilobytes)
        }
    }

    /// Within a limit, the program must not map the margin of 16 MiB to find out whether it is
    /// left: other threads would find no memory meanwhile. The library ends a program that does.
    @Test(.enabled(if: Preload.isUsable, "needs a C compiler"))
    func theMarginIsNotMapped() throws {
        let library = try Preload(
            """
            #define _GNU_SOURCE
            #include <dlfcn.h>
            #include <stdlib.h>
            #include <sys/mman.h>
            void *mmap(void *start, size_t length, int rights, int flags, int file, off_t offset) {
                if (file == -1 && length >= 16 << 20) abort();
                void *(*next)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap");
                return next(start, length, rights, flags, file, offset);
            }
            """)
        let outcome = try run(
            "bash",
            [
                "-c", "ulimit -v 500000; LD_PRELOAD=\(library.path) exec \"$0\" \"$@\"", Swimg.path,
                "compare", "disk.raw", "image.qcow2",
            ], in: folder.path)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
    }

    /// Memory in KiB that the loader and Swift's runtime need before swimg's code runs.
    private static let leastMemory = 36_000

    private func limited(kilobytes: Int, _ line: String) throws -> Outcome {
        try run(
            "bash",
            ["-c", "ulimit -v \(kilobytes); exec \"$0\" \"$@\"", Swimg.path] + line.words,
            in: folder.path)
    }

    /// Running out of memory over large tables gives one error line and leaves the image unchanged.
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
