import Foundation
import TestSupport
import Testing

/// Encrypted images made by this program, read by qemu-img and cryptsetup.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct EncryptedWriteTests {
    private let folder: TempFolder
    private let disk = DiskSketch.oddlySized

    init() throws { folder = try TempFolder() }

    private func image(_ format: String) -> String { folder.path("image.\(format)") }

    /// The facts of `info` but for random and measured ones.
    private func facts(_ path: String) throws -> String {
        let text = try Qemu.img("info", path)
        let variable = ["image:", "disk size:", "    uuid:", "iters:"]
        return text.split(separator: "\n").filter { line in
            !variable.contains { line.contains($0) }
        }.joined(separator: "\n")
    }

    @Test(arguments: some(of: EncryptedReadTests.ciphers, with: ["luks", "qcow2"]))
    func creates(_ cipher: String, _ format: String) throws {
        let path = image(format)
        let words =
            EncryptedImage.secret + ["-o", EncryptedImage.creation(format, cipher: cipher)]
        let theirs = try require("qemu-img", ["create", "-f", format] + words + [path, "3M"])
        let judged = try facts(path)
        let own = try run(Swimg.path, ["create", "-f", format] + words + [path, "3M"])
        #expect(own.isSuccess && own.errors.isEmpty, "\(own)")
        #expect(own.outputText == theirs)
        #expect(try facts(path) == judged)
        let named = EncryptedImage.secret + ["--image-opts", EncryptedImage.options(format, path)]
        if format == "qcow2" { try require("qemu-img", ["check"] + named) }
        // Both programs read what qemu-io writes.
        try EncryptedImage.io(format, path, ["write -P 7 64k 100k", "write -P 3 3145216 512"])
        let target = folder.path("own.raw")
        #expect(try Swimg.convert(named + ["-O", "raw", target]).isSuccess)
        let read = try contents(target)
        #expect(read[65536..<65536 + 102_400].allSatisfy { $0 == 7 })
        #expect(try mismatch(read, EncryptedImage.disk(format, path)) == nil)
    }

    @Test(.enabled(if: hasProgram("cryptsetup"), "the judge is cryptsetup"))
    func opensWithCryptsetup() throws {
        let path = image("luks")
        for cipher in ["", "cipher-alg=aes-192,cipher-mode=cbc", "hash-alg=sha512"] {
            let options = EncryptedImage.creation("luks", cipher: cipher)
            try require(
                Swimg.path,
                ["create", "-q", "-f", "luks"] + EncryptedImage.secret + [
                    "-o", options, path, "1M",
                ])
            let dump = try require("cryptsetup", ["luksDump", path])
            #expect(dump.contains("Key Slot 0: ENABLED"))
            let key = try folder.write("key", Array(EncryptedImage.passphrase.utf8))
            let test = ["open", "--test-passphrase", path, "--key-file"]
            try require("cryptsetup", test + [key])
            let wrong = try run("cryptsetup", test + [path])
            #expect(wrong.status == 2, "\(wrong)")
        }
    }

    @Test(
        arguments: some(
            of: [
                ("luks", ""), ("qcow2", ""), ("qcow2", "cluster_size=512"),
                ("qcow2", "cluster_size=2M"), ("qcow2", "compat=0.10"), ("qcow2", "extended_l2=on"),
                ("qcow2", "refcount_bits=1,cluster_size=4k"), ("qcow2", "preallocation=metadata"),
                ("qcow2", "preallocation=falloc"), ("qcow2", "preallocation=full"),
                ("luks", "preallocation=falloc"), ("luks", "preallocation=full"),
            ], with: [["-W"], ["-m", "1"], ["-S", "0"]]))
    func converts(_ target: (format: String, options: String), _ manner: [String]) throws {
        let source = try disk.writeRaw(folder.path("disk.raw"))
        let path = image(target.format)
        let options = [EncryptedImage.creation(target.format), target.options].filter {
            !$0.isEmpty
        }
        let own = try Swimg.convert(
            EncryptedImage.secret + manner + ["-O", target.format, "-f", "raw"]
                + options.flatMap { ["-o", $0] } + [source, path])
        #expect(own.isSuccess && own.errors.isEmpty, "\(own)")
        let named =
            EncryptedImage.secret + [
                "--image-opts", EncryptedImage.options(target.format, path),
            ]
        try require("qemu-img", ["compare"] + named + ["driver=raw,file.filename=\(source)"])
        if target.format == "qcow2" { try require("qemu-img", ["check"] + named) }
        // The plain text is nowhere in the file.
        let text = Data(disk.bytes[..<512])
        #expect(try contents(path).range(of: text) == nil)
        // And back again, by this program alone.
        let back = folder.path("back.raw")
        #expect(try Swimg.convert(named + ["-O", "raw", back]).isSuccess)
        #expect(try mismatch(contents(back), Data(disk.bytes)) == nil)
    }

    /// Sources without a size, from one encrypted image to another, parts, and overlays.
    @Test func otherSources() throws {
        let source = try disk.writeRaw(folder.path("disk.raw"))
        try require("gzip", ["-k", source])
        let whole = Data(disk.bytes)
        func expect(
            _ words: [String], _ format: String, _ expected: Data,
            at location: SourceLocation = #_sourceLocation
        ) throws {
            let path = image(format)
            let own = try run(
                Swimg.path, [words[0]] + EncryptedImage.secret + Array(words.dropFirst()))
            #expect(own.isSuccess, "\(own)", sourceLocation: location)
            let read = try EncryptedImage.disk(format, path)
            #expect(mismatch(read, expected) == nil, sourceLocation: location)
        }
        for format in ["luks", "qcow2"] {
            let options = ["-O", format, "-o", EncryptedImage.creation(format)]
            try expect(["convert"] + options + [source + ".gz", image(format)], format, whole)
        }
        let copy = folder.path("copy.luks")
        try FileManager.default.moveItem(atPath: image("luks"), toPath: copy)
        try expect(
            ["convert", "-O", "qcow2", "-o", EncryptedImage.creation("qcow2"), "--image-opts"]
                + [EncryptedImage.options("luks", copy), image("qcow2")], "qcow2", whole)
        try Qemu.img("create", "-q", "-f", "raw", folder.path("base"), "9M")
        try expect(
            ["convert", "-O", "qcow2", "-o", EncryptedImage.creation("qcow2")]
                + ["-B", folder.path("base"), "-F", "raw", source, image("qcow2")], "qcow2", whole)
    }

    /// Existing images keep their header, with all keys, and what lies behind the source.
    @Test(arguments: ["luks", "qcow2"], ["8M", "12M"])
    func existingImages(_ format: String, _ size: String) throws {
        let source = folder.path("source.raw")
        try writeFilled(source, byte: 9, count: 8 << 20)
        let path = image(format)
        try EncryptedImage.make(format, path, size: size, cipher: "hash-alg=sha1")
        try EncryptedImage.io(format, path, ["write -P 7 0 \(size)"])
        let uuid = try #require(
            try Qemu.img("info", path).split(separator: "\n").first { $0.contains("uuid:") })
        let named =
            EncryptedImage.secret + [
                "-n", "--target-image-opts", source, EncryptedImage.options(format, path),
            ]
        let own = try Swimg.convert(named)
        #expect(own.isSuccess && own.errors.isEmpty, "\(own)")
        let read = try EncryptedImage.disk(format, path)
        #expect(read.prefix(8 << 20).allSatisfy { $0 == 9 })
        #expect(read.dropFirst(8 << 20).allSatisfy { $0 == 7 })
        #expect(read.count == (size == "8M" ? 8 << 20 : 12 << 20))
        #expect(try Qemu.img("info", path).contains(uuid))
        let wrong = try Swimg.convert(["--object", "secret,id=s,data=wrong"] + named.dropFirst(2))
        #expect(wrong.status == 1 && wrong.errorText.contains("Invalid password"), "\(wrong)")
        let compressed = try Swimg.convert(["-c"] + named)
        #expect(compressed.status == 1, "\(compressed)")
        #expect(try mismatch(EncryptedImage.disk(format, path), read) == nil)
    }

    /// Encrypted images whose data is in a file of its own: new ones, and one of qemu's that is
    /// written into.
    @Test(arguments: [
        "", "cluster_size=4k", "extended_l2=on", "cluster_size=2M", "preallocation=metadata",
        "preallocation=falloc", "preallocation=full",
    ])
    func dataFiles(_ options: String) throws {
        let source = try disk.writeRaw(folder.path("disk.raw"))
        let path = image("qcow2")
        let data = folder.path("data")
        let words =
            ["-o", EncryptedImage.creation("qcow2"), "-o", "data_file=\(data)"]
            + (options.isEmpty ? [] : ["-o", options])
        let named =
            EncryptedImage.secret + ["--image-opts", EncryptedImage.options("qcow2", path)]
        func expectDisk(at location: SourceLocation = #_sourceLocation) throws {
            let read = try EncryptedImage.disk("qcow2", path)
            #expect(mismatch(read, Data(disk.bytes)) == nil, sourceLocation: location)
            try require("qemu-img", ["check"] + named)
            for file in [path, data] {
                #expect(
                    try contents(file).range(of: Data(disk.bytes[..<512])) == nil, "\(file)",
                    sourceLocation: location)
            }
            let back = folder.path("back.raw")
            let own = try Swimg.convert(named + ["-O", "raw", back])
            #expect(own.isSuccess, "\(own)", sourceLocation: location)
            #expect(
                try mismatch(contents(back), Data(disk.bytes)) == nil, sourceLocation: location)
        }
        let own = try Swimg.convert(
            EncryptedImage.secret + ["-O", "qcow2", "-f", "raw"] + words + [source, path])
        #expect(own.isSuccess && own.errors.isEmpty, "\(own)")
        try expectDisk()

        for file in [path, data] { try FileManager.default.removeItem(atPath: file) }
        try require(
            "qemu-img",
            ["create", "-q", "-f", "qcow2"] + EncryptedImage.secret + words
                + [path, "\(disk.bytes.count)"])
        let half = disk.bytes.count / 1024 * 512
        try EncryptedImage.io(
            "qcow2", path, ["write -P 3 0 \(half)", "write -z 0 4k", "discard 64k 64k"])
        let existing = try Swimg.convert(
            EncryptedImage.secret + ["-n", "-f", "raw", "--target-image-opts", source]
                + [EncryptedImage.options("qcow2", path)])
        #expect(existing.isSuccess && existing.errors.isEmpty, "\(existing)")
        try expectDisk()
    }

    @Test(
        arguments: some(
            2,
            of: [
                "-O luks -o key-secret=s", "-O luks -o key-secret=s,cipher-alg=aes-128",
                "-O qcow2 -o encrypt.format=luks,encrypt.key-secret=s",
                "-O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,cluster_size=512",
                "-O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=aes-128",
                "-O luks", "-O luks -o key-secret=x", "-O qcow2 -o encrypt.format=luks",
            ]))
    func measures(_ line: String) throws {
        let source = try disk.writeRaw(folder.path("disk.raw"))
        for disk in [["--size", "5M"], ["-f", "raw", source]] {
            let words = ["measure"] + EncryptedImage.secret + line.words + disk
            let theirs = try run("qemu-img", words)
            let own = try run(Swimg.path, words)
            #expect(own.status == theirs.status && own.output == theirs.output, "\(own)\n\(theirs)")
            #expect(own.errorText.hasSuffix(theirs.errorText.dropFirst("qemu-img: ".count)))
        }
    }

    /// The words of qemu-img, and no file.
    @Test(arguments: [
        "-f luks", "-f luks -o key-secret=x", "-f luks -o key-secret=s,cipher-alg=foo",
        "-f luks -o key-secret=s,cipher-mode=foo", "-f luks -o key-secret=s,ivgen-alg=foo",
        "-f luks -o key-secret=s,hash-alg=foo", "-f luks -o key-secret=s,ivgen-hash-alg=foo",
        "-f luks -o key-secret=s,cipher-alg=3des", "-f luks -o key-secret=s,cipher-alg",
        "-f qcow2 -o encrypt.format=luks", "-f qcow2 -o encrypt.key-secret=s",
        "-f qcow2 -o encrypt.format=foo,encrypt.key-secret=s",
        "-f qcow2 -o encryption=on,encrypt.format=luks,encrypt.key-secret=s",
        "-f luks -b x -F raw -o key-secret=s",
    ])
    func refusals(_ line: String) throws {
        let words = ["create"] + EncryptedImage.secret + line.words + ["new", "1M"]
        let theirs = try run("qemu-img", words, in: folder.path)
        try? FileManager.default.removeItem(atPath: folder.path("new"))
        let own = try run(Swimg.path, words, in: folder.path)
        #expect(own.status == 1 && theirs.status == 1, "\(own)\n\(theirs)")
        #expect(own.outputText == theirs.outputText, "\(own)\n\(theirs)")
        #expect(withoutName(own) == withoutName(theirs))
        #expect(folder.names.isEmpty, "left behind by \(own)")
    }

    /// Images that qemu-img makes, and that this program only reads or does not know.
    @Test(arguments: [
        ("-f qcow2 -o encryption=on,encrypt.key-secret=s", "only be read"),
        ("-f qcow2 -o encrypt.format=aes,encrypt.key-secret=s", "only be read"),
        (
            "-f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,data_file=d,data_file_raw=on",
            "raw data file"
        ),
        ("-f luks -o key-secret=s,cipher-mode=ctr", "'ctr' mode not supported"),
        ("-f luks -o key-secret=s,cipher-alg=cast5-128", "cast5-128"),
        ("-f luks -o key-secret=s,ivgen-alg=essiv,ivgen-hash-alg=sha1", "essiv:sha1"),
        ("-f luks -o key-secret=s,iter-time=-1", "too large to scale"),
        ("-f luks -o key-secret=s,iter-time=99999999999", "too large to scale"),
    ])
    func notBuilt(_ line: String, _ says: String) throws {
        let own = try run(
            Swimg.path, ["create"] + EncryptedImage.secret + line.words + ["new", "1M"],
            in: folder.path)
        #expect(own.status == 1 && own.errorText.contains(says), "\(own)")
        #expect(own.errorText.split(separator: "\n").count == 1, "\(own)")
        #expect(folder.names.isEmpty, "left behind by \(own)")
    }

    @Test func compressionIsRefused() throws {
        let source = try disk.writeRaw(folder.path("disk.raw"))
        for format in ["qcow2", "luks"] {
            let words =
                EncryptedImage.secret + ["-c", "-O", format]
                + ["-o", EncryptedImage.creation(format), source, image(format)]
            let theirs = try run("qemu-img", ["convert"] + words)
            let own = try Swimg.convert(words)
            #expect(own.status == 1 && theirs.status == 1, "\(own)\n\(theirs)")
            #expect(own.errorText.lowercased().contains("compression"), "\(own)")
            #expect(folder.names == ["disk.raw"] || folder.names == ["disk.raw", "image.luks"])
            try? FileManager.default.removeItem(atPath: image(format))
        }
    }

    @Test(arguments: ["create -f luks -o help new", "create -f luks -o help"])
    func optionsAreListed(_ line: String) throws {
        let own = try run(Swimg.path, line.words, in: folder.path)
        #expect(own.outputText == (try require("qemu-img", line.words, in: folder.path)))
    }
}

/// Encrypted images that change their size.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct EncryptedResizeTests {
    /// The disk ends within a cluster that holds data behind its end.
    @Test(
        arguments: ["luks", "aes", "luks,data_file", "luks,data_file,extended_l2"],
        ["300000", "2M", "10G", "1k"])
    func qcow2(_ kind: String, _ size: String) throws {
        let folder = try TempFolder()
        let path = folder.path("image")
        let encryption = kind.prefix { $0 != "," }
        let data =
            (kind.contains("data_file") ? ["-o", "data_file=\(path).data"] : [])
            + (kind.contains("extended_l2") ? ["-o", "extended_l2=on"] : [])
        try require(
            "qemu-img",
            ["create", "-q", "-f", "qcow2"] + EncryptedImage.secret
                + ["-o", "encrypt.format=\(encryption),encrypt.key-secret=s"] + data
                + (encryption == "luks" ? ["-o", "encrypt.iter-time=10"] : []) + [path, "192k"])
        try EncryptedImage.io("qcow2", path, ["write -P 7 0 192k"])
        let named =
            EncryptedImage.secret + [
                "--image-opts", EncryptedImage.options("qcow2", path),
            ]
        for (words, count) in [(["--shrink"], "100352"), (["--shrink"], size)] {
            let own = try run(Swimg.path, ["resize"] + words + named + [count])
            #expect(own.isSuccess == (count != "300000"), "\(own)")
        }
        try require("qemu-img", ["check"] + named)
        guard size != "10G" else {
            return try EncryptedImage.io(
                "qcow2", path,
                [
                    "read -P 7 0 100352", "read -P 0 100352 100k", "read -P 0 9G 100k",
                ])
        }
        let read = try EncryptedImage.disk("qcow2", path)
        let end = min(read.count, 100_352)
        #expect(read.count == ["2M": 2 << 20, "1k": 1024][size] ?? 100_352)
        #expect(read[..<end].allSatisfy { $0 == 7 } && read[end...].allSatisfy { $0 == 0 })
    }

    /// The first cluster is the last one, too, and the data file ends with the disk.
    @Test(arguments: ["", "extended_l2=on", "cluster_size=512"])
    func smallDataFiles(_ options: String) throws {
        let folder = try TempFolder()
        let (path, source) = (folder.path("image"), folder.path("source"))
        try writeFilled(source, byte: 7, count: 1024)
        let named =
            EncryptedImage.secret + ["--image-opts", EncryptedImage.options("qcow2", path)]
        let own = try Swimg.convert(
            EncryptedImage.secret + ["-O", "qcow2", "-f", "raw"]
                + ["-o", EncryptedImage.creation("qcow2"), "-o", "data_file=\(path).data"]
                + (options.isEmpty ? [] : ["-o", options]) + [source, path])
        #expect(own.isSuccess, "\(own)")
        #expect(try contents(path + ".data").count == 1024)
        try require(Swimg.path, ["resize"] + named + ["300k"])
        try require("qemu-img", ["check"] + named)
        let read = try EncryptedImage.disk("qcow2", path)
        #expect(read.count == 300 << 10)
        let amended = try run(Swimg.path, ["amend", "-o", "size=400k"] + named)
        #expect(amended.isSuccess, "\(amended)")
        #expect(try EncryptedImage.disk("qcow2", path) == read + Data(count: 100 << 10))
        #expect(read[..<1024].allSatisfy { $0 == 7 } && read[1024...].allSatisfy { $0 == 0 })
    }

    @Test(arguments: ["8M", "+1M", "1000448", "512"])
    func luks(_ size: String) throws {
        let folder = try TempFolder()
        var sizes: [UInt64] = []
        for (index, program) in ["qemu-img", Swimg.path].enumerated() {
            let path = folder.path("image-\(index)")
            try EncryptedImage.make("luks", path, size: "4M")
            try EncryptedImage.io("luks", path, ["write -P 7 0 4M"])
            try require(
                program,
                ["resize", "--shrink"] + EncryptedImage.secret
                    + ["--image-opts", EncryptedImage.options("luks", path), size])
            sizes.append(UInt64(try contents(path).count))
            let read = try EncryptedImage.disk("luks", path)
            #expect(read.prefix(4 << 20).allSatisfy { $0 == 7 })
        }
        #expect(sizes[0] == sizes[1])
    }

    @Test(arguments: ["luks", "qcow2"])
    func needsTheSecret(_ format: String) throws {
        let folder = try TempFolder()
        let path = folder.path("image")
        try EncryptedImage.make(format, path, size: "4M")
        let before = try contents(path)
        let own = try run(Swimg.path, ["resize", path, "8M"])
        #expect(own.status == 1 && own.errorText.contains("key-secret' is required"), "\(own)")
        let preallocated = try run(
            Swimg.path,
            ["resize", "--preallocation=metadata"] + EncryptedImage.secret
                + ["--image-opts", EncryptedImage.options(format, path), "8M"])
        #expect(preallocated.status == 1, "\(preallocated)")
        #expect(try contents(path) == before)
    }
}
