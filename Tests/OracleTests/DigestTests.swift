import Foundation
import TestSupport
import Testing

/// `digest` and `convert --digest` say what sha256sum says of the disk that qemu-img makes raw.
struct DigestTests {
    static func sha256(_ path: String) throws -> String {
        String(try require("sha256sum", ["--", path]).prefix(64))
    }

    @Test(arguments: Fixture.good.filter { $0.sha256 != nil })
    func fixtures(_ fixture: Fixture) throws {
        let path = try fixture.path()
        let words = ["digest", "-f", fixture.format ?? "raw", path]
        let outcome = try run(Swimg.path, words)
        #expect(outcome.outputText == "\(fixture.sha256 ?? "")  \(path)\n", "\(outcome)")
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        let json = try require(Swimg.path, words + ["--output=json"])
        let expected = ["filename": path, "sha256": fixture.sha256]
        #expect(try JSONDecoder().decode([String: String?].self, from: Data(json.utf8)) == expected)
    }

    @Test(
        .enabled(if: Qemu.isInstalled, "the gallery is made by qemu-img"),
        arguments: SourceGallery.names)
    func gallery(_ name: String) throws {
        let image = try SourceGallery.named(name)
        let expected = try Self.sha256(SourceGallery.reference)
        let outcome = try run(Swimg.path, ["digest", "-U", "-f", image.format, image.path])
        #expect(outcome.outputText == "\(expected)  \(image.path)\n", "\(outcome)")
    }

    @Test(
        .enabled(if: Qemu.isInstalled, "the gallery is made by qemu-img"),
        arguments: ["raw-sparse", "raw-full", "v3-512", "zlib-2M", "chain-extended"],
        TargetFormat.all.map(\.line) + ["-O raw -o size=3M", "-O qcow2 -o size=3M"])
    func conversions(_ name: String, _ target: String) throws {
        let image = try SourceGallery.named(name)
        let folder = try TempFolder()
        for mode in [["-m", "1"], ["-m", "8", "-W"], ["-S", "0"], ["--no-clone", "-p"]] {
            let words = mode + ["-f", image.format, image.path, "target"] + target.words
            let outcome = try Swimg.convert(["--digest"] + words, in: folder.path)
            let format = TargetFormat(line: target).format
            try Qemu.img(
                "convert", "-f", format, "-O", "raw", folder.path("target"), folder.path("raw"))
            let expected = try Self.sha256(folder.path("raw"))
            #expect(outcome.outputText.hasSuffix("\(expected)  target\n"), "\(outcome)")
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        }
    }

    /// What the target leaves to its backing file belongs to the guest disk.
    @Test(.enabled(if: Qemu.isInstalled, "qemu-img makes the images"))
    func backedTargets() throws {
        let folder = try TempFolder()
        try writeNoise(folder.path("base"), count: 3_000_000)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "5M", in: folder.path)
        try Qemu.io("qcow2", folder.path("top"), ["write -P 7 1M 300k", "write -z 2M 64k"])
        let expected = try require(Swimg.path, ["digest", folder.path("top")]).prefix(64)
        let words = ["-O", "qcow2", "-B", "base", "-F", "raw", "top"]
        for mode in [["-m", "1"], ["-W"]] {
            let outcome = try Swimg.convert(
                mode + ["--digest"] + words + ["target"], in: folder.path)
            #expect(outcome.outputText == "\(expected)  target\n", "\(outcome)")
        }
        try Qemu.img("convert", "-O", "raw", folder.path("top"), folder.path("raw"))
        #expect(try Self.sha256(folder.path("raw")) == expected)
    }

    @Test func expectation() throws {
        let folder = try TempFolder()
        let source = folder.path("source")
        try writeNoise(source, count: 3 << 20)
        let right = try Self.sha256(source)
        let wrong = String(right.reversed())
        for format in ["raw", "qcow2"] {
            let words = ["-f", "raw", "-O", format, source, folder.path("target")]
            let good = try Swimg.convert(["--expect-digest", right.uppercased()] + words)
            #expect(good.isSuccess && good.output.isEmpty && good.errors.isEmpty, "\(good)")
            let before = try contents(folder.path("target"))
            for digest in [wrong, "abc", ""] {
                let bad = try Swimg.convert(["--expect-digest", digest, "--digest"] + words)
                #expect(bad.status == 1 && bad.output.isEmpty, "\(bad)")
                #expect(bad.errorText.split(separator: "\n").count == 1, "\(bad)")
                #expect(try contents(folder.path("target")) == before, "an old target is untouched")
            }
            try FileManager.default.removeItem(atPath: folder.path("target"))
            #expect(try !Swimg.convert(["--expect-digest", wrong] + words).isSuccess)
            #expect(folder.names == ["source"])
        }
    }

    /// What it needs for a digest must not burden who asks for none.
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
