import Foundation
import TestSupport
import Testing

/// On slow storage the window grows, chunks become longer and writes run in parallel, with
/// identical bytes.
@Suite(.enabled(if: Qemu.isInstalled && SlowCalls.isUsable, "needs qemu-img and clang"))
struct SlowStorageTests {
    private let folder: TempFolder
    private let slow: SlowCalls

    init() throws {
        folder = try TempFolder()
        slow = try SlowCalls(milliseconds: 2)
        // 40 MiB: data, zeros, holes and compressible data, in pieces of 64 KiB to 2 MiB.
        var random = SplitMix64(seed: 24)
        var sketch = ""
        while sketch.count < 640 {
            sketch += String(
                repeating: random.pick(["A", "B", "C", "0", "-"]), count: random.pick([1, 3, 32]))
        }
        try DiskSketch(String(sketch.prefix(640)), cluster: 65536).writeRaw(folder.path("raw"))
        for (name, options) in [
            ("qcow2", ""), ("zlib", "-c"), ("zstd", "-c -o compression_type=zstd"),
            ("small", "-o cluster_size=4k"),
        ] {
            try require(
                "qemu-img", ["convert", "-O", "qcow2"] + options.words + ["raw", name],
                in: folder.path)
        }
    }

    @Test(
        arguments: some(
            of: ["raw", "qcow2", "zlib", "zstd", "small"], with: ["", "-W", "-m 2", "-t none -W"]))
    func reads(_ source: String, _ options: String) throws {
        let outcome = try run(
            Swimg.path, ["convert", "-O", "raw"] + options.words + [source, "own"],
            in: folder.path, environment: slow.environment)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        try require("cmp", ["raw", "own"], in: folder.path)
    }

    @Test(arguments: ["", "-c", "-S 0", "-o cluster_size=4k", "-o preallocation=metadata"])
    func writesTheSameImages(_ options: String) throws {
        let line = ["convert", "-O", "qcow2"] + options.words
        try require(Swimg.path, line + ["raw", "fast"], in: folder.path)
        for way in ["", "-W", "-m 2 -W"] {
            let outcome = try run(
                Swimg.path, line + way.words + ["raw", "own"], in: folder.path,
                environment: slow.environment)
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
            try require("cmp", ["fast", "own"], in: folder.path)
        }
        try Qemu.img("compare", "raw", "own", in: folder.path)
        try Qemu.img("check", "-q", "own", in: folder.path)
    }

    /// The verbs that only inspect images also keep many reads in flight, with identical output.
    @Test(arguments: [
        "measure -O qcow2 tables", "map --output=json tables", "check tables",
        "convert -O raw tables own",
    ])
    func readsManyTablesAtOnce(_ line: String) throws {
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=4k",
            "tables", "512M", in: folder.path)
        let outcome = try run(
            Swimg.path, line.words, in: folder.path, environment: slow.environment)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        let quick = try run(Swimg.path, line.words, in: folder.path)
        #expect(quick.output == outcome.output)
        #expect(try slow.sleepers().max() ?? 0 >= 16)
    }

    /// Compares in long pieces, because the latency of a read does not depend on its length.
    @Test(arguments: ["raw", "qcow2", "zstd"])
    func comparesInLongPieces(_ name: String) throws {
        let outcome = try run(
            Swimg.path, ["compare", "raw", name], in: folder.path, environment: slow.environment)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        let count = try slow.sleepers().count
        #expect(count < 150, "\(count) reads")
        try require("cp", ["raw", "other"], in: folder.path)
        try Qemu.io("raw", folder.path("other"), ["write -P 9 33M 512", "write -P 9 39M 512"])
        let different = try run(
            Swimg.path, ["compare", "other", name], in: folder.path,
            environment: slow.environment)
        #expect(different.status == 1)
        #expect(different.outputText == "Content mismatch at offset \(33 << 20)!\n")
    }

    /// If zeroing is slow, several ranges are zeroed in parallel.
    @Test(arguments: ["", "-W"])
    func zerosWaitBesideEachOther(_ mode: String) throws {
        let counter = try Preload(
            """
            #define _GNU_SOURCE
            #include <stdatomic.h>
            #include <stdint.h>
            #include <stdio.h>
            #include <stdlib.h>
            #include <unistd.h>
            #include <sys/syscall.h>
            static atomic_int now, most;
            int fallocate64(int fd, int mode, int64_t offset, int64_t length) {
                int count = atomic_fetch_add(&now, 1) + 1, old = atomic_load(&most);
                while (old < count && !atomic_compare_exchange_weak(&most, &old, count)) {}
                if (old < count) {
                    FILE *log = fopen(getenv("ZERO_LOG"), "a");
                    if (log) { fprintf(log, "%d\\n", count); fclose(log); }
                }
                usleep(20000);
                long result = syscall(SYS_fallocate, fd, mode, offset, length);
                atomic_fetch_sub(&now, 1);
                return (int)result;
            }
            int fallocate(int fd, int mode, int64_t offset, int64_t length) {
                return fallocate64(fd, mode, offset, length);
            }
            """)
        let folder = try TempFolder()
        for name in ["zeros", "target"] {
            try require("truncate", ["-s", "16G", folder.path(name)])
        }
        try Qemu.io("raw", folder.path("target"), ["write -P 1 1G 64k", "write -P 1 15G 64k"])
        let log = folder.path("log")
        let outcome = try run(
            Swimg.path,
            ["convert", "-n", "-f", "raw", "-O", "raw"] + mode.words + ["zeros", "target"],
            in: folder.path,
            environment: counter.environment.merging(["ZERO_LOG": log]) { $1 })
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        let counts = try String(contentsOfFile: log, encoding: .utf8).split(separator: "\n")
        let most = counts.compactMap { Int($0) }.max() ?? 0
        #expect(
            most >= min(3 * ProcessInfo.processInfo.activeProcessorCount, 24), "\(most) at once")
        #expect(
            try Qemu.difference(folder.path("zeros"), "raw", folder.path("target"), "raw") == nil)
    }
}
