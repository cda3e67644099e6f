import Foundation
import TestSupport
import Testing

/// Files that are compressed as a whole (`disk.raw.xz`) as sources; the disk itself is the judge.
@Suite(
    .enabled(
        if: Qemu.isInstalled && ["gzip", "xz", "zstd", "bzip2"].allSatisfy(hasProgram),
        "the programs compress, qemu-img judges"))
struct CompressedSourceTests {
    static let programs = ["gz": "gzip", "xz": "xz", "zst": "zstd", "bz2": "bzip2"]
    static let endings = programs.keys.sorted()

    private let folder: TempFolder
    private let raw: String

    init() throws {
        folder = try TempFolder()
        raw = try DiskSketch.oddlySized.writeRaw(folder.path("disk.raw"))
    }

    /// Compresses a file with the program for an ending, and returns the new file's path.
    private func compress(_ path: String, _ ending: String) throws -> String {
        let program = try #require(Self.programs[ending])
        try require("/bin/sh", ["-c", "\(program) -c \(shellQuoted(path)) > \(path).\(ending)"])
        return "\(path).\(ending)"
    }

    private func expectEqual(
        _ target: String, _ format: String, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let difference = try Qemu.difference(target, format, raw, "raw")
        #expect(difference == nil, sourceLocation: sourceLocation)
    }

    private func expectFailure(
        _ outcome: Outcome, _ words: String, sourceLocation: SourceLocation = #_sourceLocation
    ) {
        #expect(outcome.status == 1, "\(outcome)", sourceLocation: sourceLocation)
        #expect(outcome.errorText.contains(words), "\(outcome)", sourceLocation: sourceLocation)
        #expect(
            outcome.errorText.split(separator: "\n").count == 1, "\(outcome)",
            sourceLocation: sourceLocation)
        #expect(
            !FileManager.default.fileExists(atPath: folder.path("out")),
            sourceLocation: sourceLocation)
    }

    /// The target is the one that the file makes uncompressed, byte for byte.
    @Test(arguments: endings)
    func convertsRawDisks(_ ending: String) throws {
        let source = try compress(raw, ending)
        for options in [
            ["-O", "raw"], ["-O", "raw", "-S", "0"], ["-O", "qcow2"], ["-c", "-O", "qcow2"],
            ["-W", "-m", "1", "-O", "raw"], ["-O", "qcow2", "-o", "cluster_size=2M"],
            ["-f", "raw", "-O", "qcow2", "-o", "cluster_size=512"],
        ] {
            let target = folder.path("out")
            let outcome = try Swimg.convert(options + [source, target])
            #expect(outcome.isSuccess, "\(options): \(outcome)")
            try expectEqual(target, options.contains("qcow2") ? "qcow2" : "raw")
            if options.contains("qcow2") { #expect(try Qemu.damage(target) == nil) }
            let plain = folder.path("plain")
            #expect(try Swimg.convert(options + ["--no-clone", raw, plain]).isSuccess)
            #expect(try contents(target) == contents(plain), "\(options)")
        }
    }

    @Test(arguments: endings)
    func convertsQcow2Images(_ ending: String) throws {
        for (name, options) in [("a", ["-O", "qcow2"]), ("b", ["-c", "-O", "qcow2"])] {
            let image = folder.path("\(name).qcow2")
            try require("qemu-img", ["convert"] + options + [raw, image])
            let source = try compress(image, ending)
            let target = folder.path("out")
            let outcome = try Swimg.convert("-O", "raw", source, target)
            #expect(outcome.isSuccess, "\(outcome)")
            try expectEqual(target, "raw")
        }
    }

    /// Images of swimg's own have one table behind the data, farther than a stream goes back.
    @Test func refusesTablesBehindTheData() throws {
        let disk = folder.path("noise.raw")
        try writeNoise(disk, count: 20 << 20)
        let image = folder.path("own.qcow2")
        #expect(try Swimg.convert("-f", "raw", "-O", "qcow2", disk, image).isSuccess)
        let source = try compress(image, "gz")
        expectFailure(
            try Swimg.convert(source, folder.path("out")), "decompress it with gzip first")
    }

    /// The edges of sectors, of the raw target's pages, of the stream's blocks.
    @Test(arguments: [0, 1, 511, 512, 2047, 4096, 5000, 1 << 20, (1 << 20) + 1, (3 << 20) - 512])
    func convertsDisksOfAnySize(_ size: Int) throws {
        let disk = folder.path("small.raw")
        try Data(noise(UInt64(size), size)).write(to: URL(fileURLWithPath: disk))
        let source = try compress(disk, "gz")
        for format in ["raw", "qcow2"] {
            let outcome = try Swimg.convert("-f", "raw", "-O", format, source, folder.path("out"))
            #expect(outcome.isSuccess, "\(outcome)")
            #expect(
                try Swimg.convert("-f", "raw", "-O", format, disk, folder.path("plain")).isSuccess)
            #expect(try contents(folder.path("out")) == contents(folder.path("plain")), "\(format)")
        }
    }

    /// Several streams, as `xz -T`, `pigz`, `pbzip2` and `cat` make them, and zeros behind them.
    @Test(arguments: endings)
    func readsSeveralStreams(_ ending: String) throws {
        let whole = try contents(raw)
        let half = whole.count / 2
        var joined = Data()
        for (index, part) in [whole[..<half], whole[half...]].enumerated() {
            let path = folder.path("part\(index)")
            try part.write(to: URL(fileURLWithPath: path))
            joined += try contents(compress(path, ending))
        }
        let source = folder.path("joined.raw.\(ending)")
        for padding in [0, 1 << 20] {
            try (joined + Data(count: padding)).write(to: URL(fileURLWithPath: source))
            let outcome = try Swimg.convert("-O", "raw", source, folder.path("out"))
            #expect(outcome.isSuccess, "\(outcome)")
            try expectEqual(folder.path("out"), "raw")
        }
    }

    @Test(arguments: endings)
    func refusesDamage(_ ending: String) throws {
        let data = try contents(compress(raw, ending))
        let source = folder.path("bad.raw.\(ending)")
        func convert(_ bytes: Data) throws -> Outcome {
            try bytes.write(to: URL(fileURLWithPath: source))
            return try Swimg.convert("-O", "raw", source, folder.path("out"))
        }
        for length in [data.count - 1, data.count / 2, 10] {
            try expectFailure(convert(data[..<length]), "cut short")
        }
        for place in [data.count / 3, data.count - 7] {
            var bad = data
            bad[place] ^= 0x24
            try expectFailure(convert(bad), "bad.raw.\(ending): ")
        }
        try expectFailure(convert(data + Data("and more of something else".utf8)), "damaged")
    }

    @Test func tellsTheDigest() throws {
        let source = try compress(raw, "xz")
        let wanted = "sha256:" + (try sha256(raw))
        let digest = try run(Swimg.path, ["digest", "--algorithm", "sha256", source])
        #expect(digest.outputText == "\(wanted)  \(source)\n", "\(digest)")
        let target = folder.path("out")
        #expect(try Swimg.convert("--expect-digest", wanted, source, target).isSuccess)
        let file = try sha256(source)
        for option in [file, "sha256:" + file.uppercased()] {
            let outcome = try Swimg.convert("--source-digest", option, source, target)
            #expect(outcome.isSuccess, "\(outcome)")
            try expectEqual(target, "raw")
        }
        try FileManager.default.removeItem(atPath: target)
        let other = wanted.dropFirst(7)
        expectFailure(
            try Swimg.convert("--source-digest", String(other), source, target), "sha256:\(file)")
        let bad = folder.path("bad.raw.xz")
        try (contents(source) + Data(count: 4)).write(to: URL(fileURLWithPath: bad))
        expectFailure(try Swimg.convert("--source-digest", file, bad, target), "digest of the file")
    }

    /// The digest of files that are not compressed is that of all their bytes, read once.
    @Test func tellsTheDigestOfPlainFiles() throws {
        let image = folder.path("image.qcow2")
        try Qemu.img("convert", "-O", "qcow2", raw, image)
        let target = folder.path("out")
        for source in [raw, image] {
            let digest = try sha256(source)
            let outcome = try Swimg.convert("--source-digest", digest, source, target)
            #expect(outcome.isSuccess, "\(outcome)")
            try expectEqual(target, "raw")
            try FileManager.default.removeItem(atPath: target)
            let wrong = String(digest.reversed())
            expectFailure(
                try Swimg.convert("--source-digest", wrong, source, target), "digest of the file")
        }
        expectFailure(
            try Swimg.convert("--source-digest", try sha256(raw), raw, image, target),
            "single source")
        expectFailure(
            try Swimg.convert("--source-digest", "blkhash:12", raw, target), "--source-digest takes"
        )
    }

    /// A name or first bytes alone do not make a compressed file.
    @Test func takesOtherFilesAsTheyAre() throws {
        let compressed = try compress(raw, "gz")
        let named = folder.path("disk.img.gz")
        try FileManager.default.copyItem(atPath: raw, toPath: named)
        let unnamed = folder.path("disk.bin")
        try FileManager.default.copyItem(atPath: compressed, toPath: unnamed)
        for source in [named, unnamed] {
            #expect(try Swimg.convert("-O", "raw", source, folder.path("out")).isSuccess)
            let difference = try Qemu.difference(folder.path("out"), "raw", source, "raw")
            #expect(difference == nil)
        }
        let described = "driver=raw,file.filename=\(compressed)"
        let outcome = try Swimg.convert(
            "--image-opts", "-O", "raw", described, folder.path("out"))
        #expect(outcome.isSuccess, "\(outcome)")
        let difference = try Qemu.difference(folder.path("out"), "raw", compressed, "raw")
        #expect(difference == nil)
        // A backing file is what its image says.
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", compressed, "-F", "raw", folder.path("over.qcow2"))
        #expect(try Swimg.convert(folder.path("over.qcow2"), folder.path("out")).isSuccess)
        #expect(try Qemu.difference(folder.path("out"), "raw", compressed, "raw") == nil)
    }

    @Test func refusesWhatNeedsTheSize() throws {
        let source = try compress(raw, "zst")
        let target = folder.path("out")
        for (options, words) in [
            ([raw], "joined"), (["-o", "preallocation=falloc"], "preallocated"),
        ] {
            let outcome = try Swimg.convert(["-O", "raw"] + options + [source, target])
            expectFailure(outcome, words)
        }
        for options in [["-B", raw, "-F", "raw"], ["-o", "size=1G"]] {
            expectFailure(
                try Swimg.convert(["-O", "qcow2"] + options + [source, target]),
                "only its end tells")
        }
        let old = folder.path("old.qcow2")
        try Qemu.img("create", "-q", "-f", "qcow2", old, "16M")
        expectFailure(try Swimg.convert("-n", "-O", "qcow2", source, old), "existing")
    }

    /// Existing raw targets keep their size, and one that is too small is an error.
    @Test func writesIntoExistingFiles() throws {
        let source = try compress(raw, "gz")
        let target = folder.path("there")
        try writeFilled(target, byte: 7, count: 9_961_984 + 5000)
        let outcome = try Swimg.convert("-n", "-O", "raw", source, target)
        #expect(outcome.isSuccess, "\(outcome)")
        let bytes = try contents(target)
        #expect(bytes.count == 9_961_984 + 5000)
        #expect(bytes.prefix(9_961_984) == (try contents(raw)))
        #expect(bytes.dropFirst(9_961_984).allSatisfy { $0 == 7 })
        try writeFilled(target, byte: 7, count: 9 << 20)
        let small = try Swimg.convert("-n", "-O", "raw", source, target)
        #expect(small.status == 1 && small.errorText.contains("is smaller"), "\(small)")
    }

    @Test(.enabled(if: Nginx.isInstalled))
    func readsFromServers() throws {
        let source = try compress(raw, "xz")
        let digest = try sha256(source)
        let server = try Nginx(folder.path)
        for name in ["disk.raw.xz", "disk.raw.xz?signature=1"] {
            let target = folder.path("out")
            let outcome = try Swimg.convert(
                "--source-digest", digest, "-O", "qcow2", "\(server.url)/\(name)", target)
            #expect(outcome.isSuccess, "\(outcome)")
            try expectEqual(target, "qcow2")
        }
        let odd = try OddServer(source, "noranges")
        let outcome = try Swimg.convert("-O", "raw", odd.url + "/x.raw.xz", folder.path("out"))
        #expect(outcome.isSuccess, "\(outcome)")
        try expectEqual(folder.path("out"), "raw")
        #expect(try odd.requests().count == 1)
    }

    /// A stream does not tell how far it has come, so the compressed file does.
    @Test func showsProgress() throws {
        let source = try compress(raw, "gz")
        let outcome = try Swimg.convert("-p", "-O", "raw", source, folder.path("out"))
        #expect(
            outcome.isSuccess && outcome.outputText.hasSuffix("(100.00/100%)\r\n"), "\(outcome)")
        #expect(outcome.outputText.contains("(0.00/100%)"), "\(outcome)")
    }
}
