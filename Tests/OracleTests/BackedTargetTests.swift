import Foundation
import TestSupport
import Testing

/// `-B`: a target over a backing file keeps unallocated what that file already holds.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct BackedTargetTests {
    let folder: TempFolder
    let base = DiskSketch("AAAA1111bbbbCCCC----++++", cluster: 65536)

    init() throws {
        folder = try TempFolder()
        try base.writeRaw(folder.path("base.raw"))
        try base.writeQcow2(folder.path("base.qcow2"), options: "cluster_size=4k")
        for format in ["raw", "qcow2"] {
            try Qemu.img(
                "create", "-q", "-f", "qcow2", "-b", "base.\(format)", "-F", format,
                "over.\(format)",
                in: folder.path)
            try Qemu.io(
                "qcow2", folder.path("over.\(format)"),
                [
                    "write -P 9 64k 64k", "write -z 256k 128k", "write -P 8 700k 10k",
                    "write -P 0 1M 5k",
                ])
        }
    }

    @Test(
        arguments: [
            "", "-W", "-m 1", "-S 512", "-o cluster_size=4k", "-o cluster_size=512 -W",
            "-o compat=0.10",
            "-o cluster_size=2M", "-c", "-c -W -o compression_type=zstd", "-t none", "-S 64k",
        ], ["raw", "qcow2"])
    func keepsWhatTheBackingFileHolds(_ options: String, _ format: String) throws {
        let words = options.words
        let line = words + ["-f", "qcow2", "-O", "qcow2", "-B", "base.\(format)", "-F", format]
        let outcome = try Swimg.convert(line + ["over.\(format)", "own"], in: folder.path)
        try judge(
            outcome, folder.path("own"), "qcow2", against: folder.path("over.\(format)"), "qcow2")
        #expect(try Qcow2Fields(folder.path("own")).backingFile == "base.\(format)")
        // No more clusters of its own than qemu-img's target has.
        try require(
            "qemu-img", ["convert"] + line + ["over.\(format)", "theirs"], in: folder.path)
        let own = try ownBytes("own")
        let theirs = try ownBytes("theirs")
        #expect(own <= theirs, "\(own) bytes allocated, qemu-img \(theirs): \(outcome)")
        let info = try Qemu.img("info", "--output=json", folder.path("own"))
        #expect(info.contains("\"backing-filename-format\": \"\(format)\""), "\(info)")
    }

    /// The same by `-o backing_file=,backing_fmt=`.
    @Test func backingFileAsAnOption() throws {
        let outcome = try Swimg.convert(
            "-f", "qcow2", "-O", "qcow2", "-o", "backing_file=base.raw,backing_fmt=raw", "over.raw",
            "own", in: folder.path)
        try judge(outcome, folder.path("own"), "qcow2", against: folder.path("over.raw"), "qcow2")
        let fields = try Qcow2Fields(folder.path("own"))
        #expect(fields.backingFile == "base.raw")
    }

    /// A raw source has no layer: all of it is written, and zeros hide what the base holds.
    @Test(arguments: ["", "-o compat=0.10", "-c", "-W -o cluster_size=4k"])
    func rawSourceOverABackingFile(_ options: String) throws {
        try DiskSketch("--A0" + String(repeating: "-", count: 20)).writeRaw(folder.path("source"))
        let outcome = try Swimg.convert(
            options.words + ["-f", "raw", "-O", "qcow2"]
                + ["-B", "base.raw", "-F", "raw", "source", "own"], in: folder.path)
        try judge(outcome, folder.path("own"), "qcow2", against: folder.path("source"))
    }

    /// A disk longer than its new backing file, and one that is shorter.
    @Test(arguments: [10, 24, 40], ["-o compat=0.10", "", "-c"])
    func otherSizesThanTheBackingFile(_ clusters: Int, _ options: String) throws {
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "sized",
            "\(clusters * 65536 - 512)", in: folder.path)
        try Qemu.io("qcow2", folder.path("sized"), ["write -P 7 100k 200k"])
        let outcome = try Swimg.convert(
            options.words + ["-f", "qcow2", "-O", "qcow2"]
                + ["-B", "base.raw", "-F", "raw", "sized", "own"], in: folder.path)
        try judge(outcome, folder.path("own"), "qcow2", against: folder.path("sized"), "qcow2")
    }

    /// vdsm: create the overlay first, then `-n -B`.
    @Test(arguments: ["", "-W"])
    func intoAnExistingOverlay(_ mode: String) throws {
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "own", in: folder.path)
        let outcome = try Swimg.convert(
            mode.words + ["-n", "-f", "qcow2", "-O", "qcow2"]
                + ["-B", "base.raw", "-F", "raw", "over.raw", "own"], in: folder.path)
        try judge(outcome, folder.path("own"), "qcow2", against: folder.path("over.raw"), "qcow2")
        #expect(try Qcow2Fields(folder.path("own")).backingFile == "base.raw")
    }

    private func ownBytes(_ name: String) throws -> Int64 {
        try Qemu.map(folder.path(name), "qcow2").filter { $0.depth == 0 }.map(\.length).reduce(0, +)
    }
}
