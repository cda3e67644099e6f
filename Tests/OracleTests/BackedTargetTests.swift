import Foundation
import TestSupport
import Testing

/// `-B`: a target over a backing file keeps unallocated what that file already contains.
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
            "-o extended_l2=on", "-o extended_l2=on,cluster_size=16k -W", "-S 0",
            "-S 0 -o extended_l2=on", "-o extended_l2=on,cluster_size=2M", "-c -o extended_l2=on",
        ], ["raw", "qcow2"])
    func keepsWhatTheBackingFileHolds(_ options: String, _ format: String) throws {
        let words = options.words
        let line = words + ["-f", "qcow2", "-O", "qcow2", "-B", "base.\(format)", "-F", format]
        let outcome = try Swimg.convert(line + ["over.\(format)", "own"], in: folder.path)
        try judge(
            outcome, folder.path("own"), "qcow2", against: folder.path("over.\(format)"), "qcow2")
        #expect(try Qcow2Fields(folder.path("own")).backingFile == "base.\(format)")
        // swimg's target may not have more clusters of its own than qemu-img's.
        try require(
            "qemu-img", ["convert"] + line + ["over.\(format)", "theirs"], in: folder.path)
        let own = try ownBytes("own")
        let theirs = try ownBytes("theirs")
        #expect(own <= theirs, "\(own) bytes allocated, qemu-img \(theirs): \(outcome)")
        if options.contains("-S 0") { #expect(own == theirs, "\(outcome)") }
        let info = try Qemu.img("info", "--output=json", folder.path("own"))
        #expect(info.contains("\"backing-filename-format\": \"\(format)\""), "\(info)")
    }

    /// Clusters have places ahead, and show the backing file until they are written.
    @Test(arguments: ["metadata", "falloc", "full"], ["", "-W -S 0", "-o data_file=data"])
    func preallocated(_ mode: String, _ manner: String) throws {
        let line =
            ["-f", "qcow2", "-O", "qcow2", "-B", "base.raw", "-F", "raw", "-o"]
            + ["extended_l2=on,cluster_size=16k,preallocation=\(mode)"] + manner.words
        let outcome = try Swimg.convert(line + ["over.raw", "own"], in: folder.path)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        let compared = try run("qemu-img", ["compare", "over.raw", "own"], in: folder.path)
        #expect(compared.isSuccess, "\(outcome)\n\(compared)")
        #expect(try run("qemu-img", ["check", "own"], in: folder.path).isSuccess, "\(outcome)")
        let map = try Qemu.img("map", "--output=json", "own", in: folder.path)
        #expect(map.contains("\"depth\": 1"), "\(map)")
        guard !manner.contains("data_file") else { return }
        try require("qemu-img", ["convert"] + line + ["over.raw", "theirs"], in: folder.path)
        // The clusters of zeros give their places back, in both.
        let (own, theirs) = try (fileSize("own"), fileSize("theirs"))
        #expect(abs(own - theirs) <= 1 << 20 && own > base.size, "\(own), \(theirs)")
        // Later writes go to the places that are there.
        try Qemu.io("qcow2", folder.path("own"), ["write -P 3 128k 64k"])
        #expect(try fileSize("own") == own)
    }

    private func fileSize(_ name: String) throws -> Int64 {
        try #require(FileStatus(folder.path(name))).size
    }

    /// The backing file given as `-o backing_file=,backing_fmt=`.
    @Test func backingFileAsAnOption() throws {
        let outcome = try Swimg.convert(
            "-f", "qcow2", "-O", "qcow2", "-o", "backing_file=base.raw,backing_fmt=raw", "over.raw",
            "own", in: folder.path)
        try judge(outcome, folder.path("own"), "qcow2", against: folder.path("over.raw"), "qcow2")
        let fields = try Qcow2Fields(folder.path("own"))
        #expect(fields.backingFile == "base.raw")
    }

    /// A raw source has no layers: the whole disk is written, and zeros hide the base's data.
    @Test(arguments: ["", "-o compat=0.10", "-c", "-W -o cluster_size=4k"])
    func rawSourceOverABackingFile(_ options: String) throws {
        try DiskSketch("--A0" + String(repeating: "-", count: 20)).writeRaw(folder.path("source"))
        let outcome = try Swimg.convert(
            options.words + ["-f", "raw", "-O", "qcow2"]
                + ["-B", "base.raw", "-F", "raw", "source", "own"], in: folder.path)
        try judge(outcome, folder.path("own"), "qcow2", against: folder.path("source"))
    }

    static let bases = ["base.raw", "base.qcow2", "short.raw", "long.qcow2"]
    static let targets = [
        "", "-W -m 3", "-o compat=0.10", "-o cluster_size=4k", "-o cluster_size=2M", "-c", "-S 0",
        "-o extended_l2=on", "-o compat=0.10 -c", "-o extended_l2=on,preallocation=metadata",
    ]

    /// A qcow2 source without a backing file reads as zeros where it allocates nothing, so the
    /// base's data must not show through.
    @Test(arguments: some(of: targets, with: bases))
    func sourceWithoutABackingFile(_ options: String, _ base: String) throws {
        try makeBases()
        for made in ["cluster_size=64k", "cluster_size=4k", "extended_l2=on,cluster_size=64k"] {
            try makeSource("source", made)
            let line = options.words + ["-O", "qcow2", "-f", "qcow2"]
            let backing = ["-B", base, "-F", format(base)]
            let outcome = try Swimg.convert(line + backing + ["source", "own"], in: folder.path)
            try judge(outcome, folder.path("own"), "qcow2", against: folder.path("source"), "qcow2")
            #expect(try Qcow2Fields(folder.path("own")).backingFile == base)
        }
    }

    @Test(arguments: bases)
    func sourceWithoutABackingFileOtherWays(_ base: String) throws {
        try makeBases()
        try makeSource("source", "cluster_size=4k")
        let source = folder.path("source")
        let byOption = try Swimg.convert(
            "-f", "qcow2", "-O", "qcow2", "-o",
            "backing_file=\(base),backing_fmt=\(format(base))", "source", "own", in: folder.path)
        try judge(byOption, folder.path("own"), "qcow2", against: source, "qcow2")

        // The state at a snapshot, without later writes.
        try Qemu.img("snapshot", "-c", "then", source)
        try Qemu.io("qcow2", source, ["write -P 5 0 64k", "write -P 6 1M 64k", "discard 300k 64k"])
        try Qemu.img(
            "convert", "-f", "qcow2", "-O", "raw", "-l", "then", source, folder.path("then"))
        let old = try Swimg.convert(
            "-f", "qcow2", "-O", "qcow2", "-l", "then", "-B", base, "-F", format(base), "source",
            "own", in: folder.path)
        try judge(old, folder.path("own"), "qcow2", against: folder.path("then"))

        // The digest must match the disk that the target shows.
        let hashed = try Swimg.convert(
            "--digest", "-f", "qcow2", "-O", "qcow2", "-B", base, "-F", format(base), "source",
            "own", in: folder.path)
        #expect(hashed.isSuccess, "\(hashed)")
        #expect(try Qemu.difference(folder.path("own"), "qcow2", source, "qcow2") == nil)
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", source, folder.path("now"))
        let sum = try blkhash(folder.path("now"))
        #expect(hashed.outputText.hasPrefix(sum), "\(hashed)")
    }

    /// The target is an existing overlay with data, of the source's size or larger.
    @Test(arguments: bases, ["-B", ""])
    func sourceWithoutABackingFileIntoAnOverlay(_ base: String, _ mode: String) throws {
        try makeBases()
        try makeSource("source", "cluster_size=4k")
        for extra in [0, 256 << 10] {
            try Qemu.img(
                "create", "-q", "-f", "qcow2", "-b", base, "-F", format(base), "own",
                "\(Self.sourceSize + extra)", in: folder.path)
            try Qemu.io("qcow2", folder.path("own"), ["write -P 4 200k 100k", "write -P 3 0 4k"])
            if extra > 0 { try Qemu.io("qcow2", folder.path("own"), ["write -P 3 1600k 8k"]) }
            try Qemu.img("convert", "-f", "qcow2", "-O", "raw", "own", "before", in: folder.path)
            let backing = mode.isEmpty ? [] : [mode, base, "-F", format(base)]
            let outcome = try Swimg.convert(
                ["-n", "-f", "qcow2", "-O", "qcow2"] + backing + ["source", "own"], in: folder.path)
            try Qemu.img("convert", "-f", "qcow2", "-O", "raw", "source", "now", in: folder.path)
            let expected =
                try contents(folder.path("now"))
                + contents(folder.path("before"))
                .dropFirst(Self.sourceSize)
            try judge(
                outcome, folder.path("own"), "qcow2",
                against: folder.write("expected", [UInt8](expected)))
        }
    }

    /// A source reads as zeros after the end of its backing file; the target's base may have data
    /// there.
    @Test(arguments: ["", "-o compat=0.10", "-c", "-o cluster_size=4k", "-o extended_l2=on"])
    func sourceOverAShorterBackingFile(_ options: String) throws {
        try makeBases()
        for made in ["cluster_size=64k", "cluster_size=4k"] {
            try Qemu.img(
                "create", "-q", "-f", "qcow2", "-o", made, "-b", "short.raw", "-F", "raw", "longer",
                "\(Self.sourceSize)", in: folder.path)
            try Qemu.io(
                "qcow2", folder.path("longer"), ["write -P 7 100k 10k", "write -P 2 1M 3k"])
            let outcome = try Swimg.convert(
                options.words + ["-f", "qcow2", "-O", "qcow2", "-B", "base.raw", "-F", "raw"]
                    + ["longer", "own"], in: folder.path)
            try judge(outcome, folder.path("own"), "qcow2", against: folder.path("longer"), "qcow2")
        }
    }

    private static let sourceSize = 24 * 65536

    /// Makes a copy of `base.raw` that is cut within a cluster, and a base longer than the source.
    private func makeBases() throws {
        let short = try contents(folder.path("base.raw")).prefix(500_224)
        _ = try folder.write("short.raw", [UInt8](short))
        try DiskSketch(String(repeating: "9A", count: 16)).writeQcow2(folder.path("long.qcow2"))
    }

    private func format(_ base: String) -> String { base.hasSuffix("raw") ? "raw" : "qcow2" }

    private func makeSource(_ name: String, _ options: String) throws {
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", options, folder.path(name), "\(Self.sourceSize)")
        try Qemu.io(
            "qcow2", folder.path(name),
            [
                "write -P 1 300k 70k", "write -z 640k 64k", "write -P 2 1M 2k",
                "write -c -P 3 128k 64k",
            ]
        )
    }

    /// Disks longer and shorter than their new backing file.
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

    /// vdsm creates the overlay first and then uses `-n -B`.
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
