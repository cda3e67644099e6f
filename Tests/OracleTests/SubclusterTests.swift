import Foundation
import TestSupport
import Testing

/// Targets with extended L2 entries: subclusters are allocated and zeroed one by one.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct SubclusterTests {
    /// Disks of random pieces of data and zeros, over a backing file or not. The target is right,
    /// and takes no more space than qemu-img's.
    @Test(arguments: some(14, of: Array(UInt64(1)...24)))
    func takesNoMoreThanQemu(_ seed: UInt64) throws {
        var generator = SplitMix64(seed: seed)
        let folder = try TempFolder()
        let isBacked = Bool.random(using: &generator)
        let size = 2 << 20
        try writeFilled(folder.path("base"), byte: 0x6b, count: size)
        let made = ["cluster_size=4k", "extended_l2=on,cluster_size=64k", "cluster_size=64k"]
        try require(
            "qemu-img",
            ["create", "-q", "-f", "qcow2", "-o", made.randomElement(using: &generator) ?? ""]
                + (isBacked ? ["-b", "base", "-F", "raw"] : []) + ["source", "\(size)"],
            in: folder.path)
        try Qemu.io(
            "qcow2", "source",
            (0..<30).map { _ in
                let what = ["write -P 3", "write -P 0", "write -z", "write -P 5"].randomElement(
                    using: &generator)
                let length = Int.random(in: 1...24, using: &generator) * 2048
                let start = Int.random(in: 0...(size - length) / 2048, using: &generator) * 2048
                return "\(what ?? "write") \(start) \(length)"
            }, in: folder.path)
        let options =
            ["extended_l2=on", "extended_l2=on,cluster_size=16k"]
            + ["extended_l2=on,cluster_size=2M", "extended_l2=on,cluster_size=128k"]
        let manner = ["", "-S 0", "-m 1", "-W"].randomElement(using: &generator) ?? ""
        let line =
            manner.words + ["-f", "qcow2", "-O", "qcow2"]
            + ["-o", options.randomElement(using: &generator) ?? ""]
            + (isBacked ? ["-B", "base", "-F", "raw"] : []) + ["source"]
        let outcome = try Swimg.convert(line + ["own"], in: folder.path)
        try judge(outcome, folder.path("own"), "qcow2", against: folder.path("source"), "qcow2")
        try require("qemu-img", ["convert"] + line + ["theirs"], in: folder.path)
        try require("sync", ["-f", "own", "theirs"], in: folder.path)
        let own = try #require(FileStatus(folder.path("own"))).allocated
        let theirs = try #require(FileStatus(folder.path("theirs"))).allocated
        #expect(own <= theirs + 4 * 4096, "\(own) bytes, qemu-img \(theirs): \(outcome)")
        // `-S 0` allocates all that the source holds, and no more.
        guard manner == "-S 0" else { return }
        func allocated(_ name: String) throws -> Int64 {
            try Qemu.map(folder.path(name), "qcow2").filter { $0.depth == 0 && $0.data }
                .map(\.length).reduce(0, +)
        }
        #expect(try allocated("own") == allocated("theirs"), "\(outcome)")
    }

    /// The entries of one cluster: data, zeros over the backing file, and what the backing file
    /// shows.
    @Test(arguments: ["", "-W -m 8", "-m 1"])
    func entries(_ manner: String) throws {
        let folder = try TempFolder()
        try writeFilled(folder.path("base"), byte: 0x6b, count: 4 << 20)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base", "-F", "raw",
            "source", in: folder.path)
        // A cluster of 2 MiB, which several chunks fill.
        try Qemu.io(
            "qcow2", "source", ["write -P 1 64k 64k", "write -z 128k 64k", "write -P 2 1M 128k"],
            in: folder.path)
        let outcome = try Swimg.convert(
            manner.words + ["-f", "qcow2", "-O", "qcow2", "-o", "extended_l2=on,cluster_size=2M"]
                + ["-B", "base", "-F", "raw", "source", "own"], in: folder.path)
        try judge(outcome, folder.path("own"), "qcow2", against: folder.path("source"), "qcow2")
        let patcher = try Qcow2Patcher(folder.path("own"))
        let entry = try patcher.l2Entry(0)
        #expect(try patcher.word(entry) >> 63 == 1)
        #expect(try patcher.word(entry + 8) == 1 << 1 | 1 << 16 | 1 << 17 | 1 << (32 + 2))
        #expect(try patcher.word(entry + 16) == 0 && patcher.word(entry + 24) == 0)
    }
}
