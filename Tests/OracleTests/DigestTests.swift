import Foundation
import TestSupport
import Testing

/// `digest` and `convert --digest` agree with blksum and sha256sum of the disk that qemu-img
/// converts to raw.
struct DigestTests {
    static let algorithms = ["blkhash", "sha256"]

    /// The digest in swimg's form, computed by another program.
    private static func digest(_ path: String, _ algorithm: String) throws -> String {
        algorithm == "sha256" ? "sha256:" + (try sha256(path)) : try blkhash(path)
    }

    @Test(arguments: Fixture.good.filter { $0.sha256 != nil })
    func fixtures(_ fixture: Fixture) throws {
        let path = try fixture.path()
        let words = ["digest", "--algorithm", "sha256", "-f", fixture.format ?? "raw", path]
        let outcome = try run(Swimg.path, words)
        #expect(outcome.outputText == "sha256:\(fixture.sha256 ?? "")  \(path)\n", "\(outcome)")
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        let json = try require(Swimg.path, words + ["--output=json"])
        let expected = ["filename": path, "algorithm": "sha256", "digest": fixture.sha256]
        #expect(try JSONDecoder().decode([String: String?].self, from: Data(json.utf8)) == expected)
    }

    /// Digests that blksum 0.11 printed. A file that ends within a sector is padded.
    static let sums = [
        (0, "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"),
        (65_536, "747f14d227d3e627485eb5c8f259dddff16ee248b453a55383d6f0887827c97e"),
        (65_537, "1c3f781d6bd501b0e0d2054f5a79cc9f5a868bbccea2c889059687b511b7bfea"),
        (131_072, "8b1abdddc11bca1878b1ad4ec4d18b91d0920dbac4be82c5eebadb5224eb882c"),
        (1_000_448, "025df44333de5d72454aaa6d8cc35a8dc412bada874783817106e1d81c7d721d"),
    ]

    @Test(arguments: sums)
    func blocks(_ size: Int, _ expected: String) throws {
        let folder = try TempFolder()
        let pattern = (0..<size).map { UInt8(truncatingIfNeeded: $0 / 1000) }
        let file = try folder.write("disk", pattern)
        if size % 512 == 0 { #expect(try blkhash(file) == "blkhash:" + expected) }
        let outcome = try run(Swimg.path, ["digest", "-f", "raw", file])
        #expect(outcome.outputText == "blkhash:\(expected)  \(file)\n", "\(outcome)")
    }

    @Test(
        .enabled(if: Qemu.isInstalled, "the gallery is made by qemu-img"),
        arguments: SourceGallery.names, algorithms)
    func gallery(_ name: String, _ algorithm: String) throws {
        let image = try SourceGallery.named(name)
        let expected = try Self.digest(SourceGallery.reference, algorithm)
        let words = algorithm == "blkhash" ? [] : ["--algorithm", algorithm]
        for mode in [[], ["-p"]] {
            let outcome = try run(
                Swimg.path, ["digest", "-U", "-f", image.format, image.path] + words + mode)
            #expect(outcome.outputText.hasSuffix("\(expected)  \(image.path)\n"), "\(outcome)")
        }
    }

    @Test(
        .enabled(if: Qemu.isInstalled, "the gallery is made by qemu-img"),
        arguments: some(
            of: ["raw-sparse", "raw-full", "v3-512", "zlib-2M", "chain-extended"],
            with: some(8, of: TargetFormat.all.map(\.line)) + [
                "-O raw -o size=3M", "-O qcow2 -o size=3M",
            ]))
    func conversions(_ name: String, _ target: String) throws {
        let image = try SourceGallery.named(name)
        let folder = try TempFolder()
        for (number, mode) in [
            ["-m", "1"], ["-m", "8", "-W"], ["-S", "0"], ["--no-clone", "-p"],
        ]
        .enumerated() {
            let words = mode + ["-f", image.format, image.path, "target"] + target.words
            let algorithm = Self.algorithms[number % 2]
            let outcome = try Swimg.convert(
                ["--digest", "--algorithm", algorithm] + words, in: folder.path)
            let format = TargetFormat(line: target).format
            try Qemu.img(
                "convert", "-f", format, "-O", "raw", folder.path("target"), folder.path("raw"))
            let expected = try Self.digest(folder.path("raw"), algorithm)
            #expect(outcome.outputText.hasSuffix("\(expected)  target\n"), "\(outcome)")
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        }
    }

    /// Runs of data and zeros that split the 64 KiB blocks anywhere, in smaller and larger
    /// clusters.
    @Test(
        .enabled(if: Qemu.isInstalled, "qemu-img makes the images"),
        arguments: ["512", "4k", "64k", "2M"])
    func piecesOfBlocks(_ clusterSize: String) throws {
        let folder = try TempFolder()
        let image = folder.path("image")
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=\(clusterSize)", image, "5M")
        var random = SplitMix64(seed: 7)
        var commands: [String] = []
        for _ in 0..<60 {
            let start = random.below(5 << 11) * 512
            let count = min((5 << 20) - start, (1 + random.below(400)) * 512)
            let pattern = random.below(3)
            commands.append(
                random.below(4) == 0
                    ? "write -z \(start) \(count)" : "write -P \(pattern) \(start) \(count)")
        }
        try Qemu.io("qcow2", image, commands)
        try Qemu.img("convert", "-O", "raw", image, folder.path("raw"))
        for algorithm in Self.algorithms {
            let expected = try Self.digest(folder.path("raw"), algorithm)
            let outcome = try run(Swimg.path, ["digest", "--algorithm", algorithm, image])
            #expect(outcome.outputText == "\(expected)  \(image)\n", "\(outcome)")
        }
    }

    /// Ranges that the target leaves to its backing file belong to the guest disk.
    @Test(.enabled(if: Qemu.isInstalled, "qemu-img makes the images"), arguments: algorithms)
    func backedTargets(_ algorithm: String) throws {
        let folder = try TempFolder()
        try writeNoise(folder.path("base"), count: 3_000_000)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "5M", in: folder.path)
        try Qemu.io("qcow2", folder.path("top"), ["write -P 7 1M 300k", "write -z 2M 64k"])
        try Qemu.img("convert", "-O", "raw", folder.path("top"), folder.path("raw"))
        let expected = try Self.digest(folder.path("raw"), algorithm)
        let words = ["-O", "qcow2", "-B", "base", "-F", "raw", "top"]
        for mode in [["-m", "1"], ["-W"]] {
            let outcome = try Swimg.convert(
                mode + ["--digest", "--algorithm", algorithm] + words + ["target"], in: folder.path)
            #expect(outcome.outputText == "\(expected)  target\n", "\(outcome)")
        }
    }

    @Test(arguments: algorithms)
    func expectation(_ algorithm: String) throws {
        let folder = try TempFolder()
        let source = folder.path("source")
        try writeNoise(source, count: 3 << 20)
        let right = try Self.digest(source, algorithm)
        let digits = right.drop { $0 != ":" }.dropFirst()
        let wrong = algorithm + ":" + String(digits.reversed())
        for format in ["raw", "qcow2"] {
            let words = ["-f", "raw", "-O", format, source, folder.path("target")]
            for expected in [
                [right], ["\(algorithm):\(digits.uppercased())"],
                [String(digits), "--algorithm", algorithm], [right, "--algorithm=\(algorithm)"],
            ] {
                let good = try Swimg.convert(["--expect-digest"] + expected + words)
                #expect(good.isSuccess && good.output.isEmpty && good.errors.isEmpty, "\(good)")
            }
            let before = try contents(folder.path("target"))
            for digest in [wrong, "abc", "", "md5:\(digits)", "\(right)0", "x:\(right)"] {
                let bad = try Swimg.convert(["--expect-digest", digest, "--digest"] + words)
                #expect(bad.status == 1 && bad.output.isEmpty, "\(bad)")
                #expect(bad.errorText.split(separator: "\n").count == 1, "\(bad)")
                #expect(try contents(folder.path("target")) == before, "an old target is untouched")
            }
            try FileManager.default.removeItem(atPath: folder.path("target"))
            #expect(try !Swimg.convert(["--expect-digest", wrong] + words).isSuccess)
            let other = Self.algorithms.first { $0 != algorithm } ?? ""
            #expect(
                try !Swimg.convert(["--expect-digest", right, "--algorithm", other] + words)
                    .isSuccess)
            #expect(folder.names == ["source"])
        }
    }

    /// Computed by blksum.
    static let emptyTebibyte = "e3918f867fb182a40237a7b7e30ba90dbd78defcf6ac1c502bff489670e79f85"

    /// Blocks of zeros have a known hash; hashing them would take a quarter of an hour.
    @Test(.enabled(if: Qemu.isInstalled, "qemu-img makes the image"))
    func zerosCostNothing() throws {
        let folder = try TempFolder()
        try Qemu.img("create", "-q", "-f", "qcow2", folder.path("image"), "1T")
        let outcome = try run(
            Swimg.path, ["digest", folder.path("image")], in: folder.path, timeout: 60)
        #expect(outcome.outputText.hasPrefix("blkhash:\(Self.emptyTebibyte)  "), "\(outcome)")
    }

    /// Commands without a digest must not load the library.
    @Test(.enabled(if: canTraceSystemCalls, "strace is needed"))
    func libraryIsLoadedForDigestsOnly() throws {
        let folder = try TempFolder()
        let source = folder.path("source")
        try writeNoise(source, count: 1 << 20)
        func opens(_ words: [String]) throws -> Bool {
            let words = ["-f", "-e", "trace=openat", "-o", folder.path("log"), Swimg.path] + words
            try require("strace", words)
            let log = try String(contentsOfFile: folder.path("log"), encoding: .utf8)
            return log.contains("libcrypto")
        }
        #expect(try !opens(["convert", "-f", "raw", source, folder.path("target")]))
        #expect(try opens(["digest", "-f", "raw", source]))
    }
}
