import Foundation
import TestSupport
import Testing

/// On storage that waits the window grows, chunks become longer and writes are made beside each
/// other: with the same bytes.
@Suite(.enabled(if: Qemu.isInstalled && SlowCalls.isUsable, "needs qemu-img and clang"))
struct SlowStorageTests {
    private let folder: TempFolder
    private let slow: SlowCalls

    init() throws {
        folder = try TempFolder()
        slow = try SlowCalls(milliseconds: 2)
        // 40 MiB: data, zeros, holes and what can be compressed, in pieces of 64 KiB to 2 MiB.
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

    @Test(arguments: ["raw", "qcow2", "zlib", "zstd", "small"], ["", "-W", "-m 2", "-t none -W"])
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
}
