import Foundation
import TestSupport
import Testing

/// Encrypted images made by qemu-img, read by both programs.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct EncryptedReadTests {
    private let folder: TempFolder

    init() throws { folder = try TempFolder() }

    static let ciphers = some(
        6,
        of: [
            "", "cipher-alg=aes-128", "cipher-alg=aes-192", "ivgen-alg=plain",
            "cipher-mode=cbc,ivgen-alg=plain64",
            "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv",
            "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5", "hash-alg=sha1",
            "hash-alg=sha224",
            "hash-alg=sha384", "hash-alg=sha512", "hash-alg=ripemd160", "hash-alg=md5",
            "cipher-alg=serpent-256", "cipher-alg=serpent-128,cipher-mode=cbc",
            "cipher-alg=twofish-256",
            "cipher-alg=twofish-128,cipher-mode=cbc,ivgen-alg=essiv,"
                + "ivgen-hash-alg=md5",
        ])

    static let writes = [
        "write -P 7 64k 100k", "write -P 9 3000000 512", "write -P 5 5M 1M", "write -P 1 0 4k",
    ]

    private func image(
        _ format: String, cipher: String = "", options: String = "", size: String = "8M"
    ) throws -> String {
        let path = folder.path("image.\(format)")
        try EncryptedImage.make(format, path, size: size, cipher: cipher, options: options)
        try EncryptedImage.io(format, path, Self.writes)
        return path
    }

    private func expectSame(
        _ words: [String], at location: SourceLocation = #_sourceLocation
    ) throws {
        let theirs = try run("qemu-img", words)
        let own = try run(Swimg.path, words)
        #expect(own.status == theirs.status, "\(own)\n\(theirs)", sourceLocation: location)
        #expect(
            withoutChildren(own.outputText) == theirs.outputText, "\(own)\n\(theirs)",
            sourceLocation: location)
        #expect(
            own.errors.isEmpty == theirs.errors.isEmpty, "\(own)\n\(theirs)",
            sourceLocation: location)
    }

    /// The disk as this program reads it.
    private func ownDisk(_ words: [String]) throws -> Data {
        let target = folder.path("own.raw")
        let outcome = try Swimg.convert(EncryptedImage.secret + ["-O", "raw"] + words + [target])
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        return try contents(target)
    }

    @Test(arguments: some(of: ciphers, with: ["luks", "qcow2"]))
    func everyCipher(_ cipher: String, _ format: String) throws {
        let path = try image(format, cipher: cipher)
        let judged = try EncryptedImage.disk(format, path)
        #expect(judged[65536..<65536 + 102_400].allSatisfy { $0 == 7 })
        let own = try ownDisk(["--image-opts", EncryptedImage.options(format, path)])
        #expect(mismatch(own, judged) == nil)
    }

    @Test(arguments: ["luks", "qcow2"])
    func verbs(_ format: String) throws {
        let path = try image(format)
        let described = EncryptedImage.options(format, path)
        let named = EncryptedImage.secret + ["--image-opts", described]
        for words in [
            ["map"], ["map", "--output=json"], ["check"], ["measure", "-O", "raw"],
            ["measure", "-O", "qcow2", "--output=json"],
        ] { try expectSame(words + named) }
        for words in [[], ["--output=json"]] {
            try expectSame(["info"] + words + [path])
            try expectSame(["info"] + words + ["-f", format, path])
        }
        let raw = folder.path("disk.raw")
        try EncryptedImage.disk(format, path).write(to: URL(fileURLWithPath: raw))
        let compared = ["driver=raw,file.filename=\(raw)"]
        try expectSame(["compare"] + named + compared)
        try expectSame(["compare", "-s"] + named + compared)
        try expectSame(["compare", "-s"] + named + [described])
        let digests = try [named, [raw]].map {
            try require(Swimg.path, ["digest"] + $0).prefix { $0 != " " }
        }
        #expect(digests[0] == digests[1])
        for part in ["bs=512 skip=100 count=400", "bs=1000 skip=65 count=200", "bs=4096 count=9"] {
            let words = ["dd"] + EncryptedImage.secret + ["--image-opts"] + part.words
            try require("qemu-img", words + ["if=\(described)", "of=\(folder.path("their"))"])
            try require(Swimg.path, words + ["if=\(described)", "of=\(folder.path("own"))"])
            #expect(
                try mismatch(contents(folder.path("own")), contents(folder.path("their"))) == nil)
        }
    }

    /// A disk that is named by `json:`, with the secret from a file, encoded, and as a JSON object.
    @Test func namesAndSecrets() throws {
        let path = try image("luks")
        let judged = try EncryptedImage.disk("luks", path)
        let json =
            #"json:{"driver":"luks","key-secret":"s","file":{"driver":"file","filename":""#
            + path + #""}}"#
        #expect(try mismatch(ownDisk([json]), judged) == nil)
        let text = Data(EncryptedImage.passphrase.utf8)
        let file = try folder.write("secret", Array(text))
        let encoded = try folder.write("encoded", Array(text.base64EncodedData()) + [10])
        for object in [
            "secret,id=s,file=\(file)", "secret,id=s,format=raw,file=\(file)",
            "secret,id=s,format=base64,file=\(encoded)",
            "secret,id=s,format=base64,data=\(text.base64EncodedString())",
            "qom-type=secret,id=s,file=\(file)",
            #"{"qom-type":"secret","id":"s","data":"\#(EncryptedImage.passphrase)"}"#,
        ] {
            let words = ["--object", object, "-O", "raw", json]
            let own = try Swimg.convert(words + [folder.path("own")])
            #expect(own.isSuccess, "\(own)")
            #expect(try mismatch(contents(folder.path("own")), judged) == nil)
            try require("qemu-img", ["convert"] + words + [folder.path("their")])
        }
    }

    /// Each length of text at the end of base64.
    @Test(arguments: ["a", "ab", "abcdefgh?>~"])
    func base64(_ passphrase: String) throws {
        let path = folder.path("image")
        let object = ["--object", "secret,id=s,data=\(passphrase)"]
        try require(
            "qemu-img",
            ["create", "-q", "-f", "luks"] + object + [
                "-o", "key-secret=s,iter-time=10", path, "1M",
            ])
        let encoded = Data(passphrase.utf8).base64EncodedString()
        let own = try run(
            Swimg.path,
            ["check", "--object", "secret,id=s,format=base64,data=\(encoded)", "--image-opts"]
                + [EncryptedImage.options("luks", path)])
        #expect(own.status == 63, "\(own)")
    }

    /// Clusters of all sizes, subclusters, snapshots, and overlays of plain and encrypted images.
    @Test(arguments: ["cluster_size=512", "extended_l2=on", "preallocation=full"])
    func qcow2Options(_ options: String) throws {
        let path = try image("qcow2", options: options)
        let described = EncryptedImage.options("qcow2", path)
        let own = try ownDisk(["--image-opts", described])
        #expect(try mismatch(own, EncryptedImage.disk("qcow2", path)) == nil)
        let named = EncryptedImage.secret + ["--image-opts", described]
        try expectSame(["map", "--output=json"] + named)
        try expectSame(["check"] + named)
    }

    @Test(arguments: ["luks", "aes"])
    func snapshotsAndBackingFiles(_ encryption: String) throws {
        try writeFilled(folder.path("base"), byte: 3, count: 6 << 20)
        let path = folder.path("image")
        try require(
            "qemu-img",
            ["create", "-q", "-f", "qcow2"] + EncryptedImage.secret
                + ["-o", "encrypt.format=\(encryption),encrypt.key-secret=s"]
                + (encryption == "luks" ? ["-o", "encrypt.iter-time=10"] : [])
                + ["-b", "base", "-F", "raw", path, "8M"], in: folder.path)
        let described = EncryptedImage.options("qcow2", path)
        let named = EncryptedImage.secret + ["--image-opts", described]
        try EncryptedImage.io("qcow2", path, Self.writes)
        let first = try EncryptedImage.disk("qcow2", path)
        try Qemu.img("snapshot", "-c", "one", named[0], named[1], named[2], named[3])
        try EncryptedImage.io("qcow2", path, ["write -P 88 100k 3M", "write -z 4M 64k"])
        let judged = try EncryptedImage.disk("qcow2", path)
        #expect(judged != first)
        #expect(try mismatch(ownDisk(["--image-opts", described]), judged) == nil)
        #expect(try mismatch(ownDisk(["-l", "one", "--image-opts", described]), first) == nil)
        for format in [[], ["--output=json"]] { try expectSame(["map"] + format + named) }
        try expectSame(["check"] + named)
        try expectSame(["info", path])
    }

    /// A sector in which the file ends counts whole.
    @Test(arguments: [1, 511, 513])
    func oddFileSize(_ bytes: UInt64) throws {
        let path = try image("luks")
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
        try file.truncate(atOffset: UInt64(try contents(path).count) - bytes)
        try file.close()
        let own = try ownDisk(["--image-opts", EncryptedImage.options("luks", path)])
        #expect(try mismatch(own, EncryptedImage.disk("luks", path)) == nil)
        try expectSame(["info", "--output=json", path])
    }

    /// The words of qemu-img; the secret is never among them.
    @Test(
        arguments: [
            ("luks", [], "FILE"), ("qcow2", [], "FILE"),
            ("luks", [], "driver=luks,key-secret=t,file.filename=FILE"),
            (
                "luks", ["--object", "secret,id=t,data=wrong"],
                "driver=luks,key-secret=t,file.filename=FILE"
            ),
            (
                "qcow2", ["--object", "secret,id=t,data=wrong"],
                "driver=qcow2,encrypt.key-secret=t,file.filename=FILE"
            ),
            ("qcow2", EncryptedImage.secret, "driver=qcow2,encrypt.format=luks,file.filename=FILE"),
            (
                "qcow2", EncryptedImage.secret,
                "driver=qcow2,encrypt.format=aes,encrypt.key-secret=s,file.filename=FILE"
            ),
            (
                "plain", EncryptedImage.secret,
                "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename=FILE"
            ),
        ] as [(String, [String], String)])
    func refusals(_ format: String, _ secret: [String], _ name: String) throws {
        let path = folder.path("image")
        if format == "plain" {
            try Qemu.img("create", "-q", "-f", "qcow2", path, "1M")
        } else {
            try EncryptedImage.make(format, path, size: "1M")
        }
        let given = name.replacingOccurrences(of: "FILE", with: path)
        let words =
            ["convert"] + secret + ["-O", "raw"] + (name == "FILE" ? [] : ["--image-opts"])
            + [given, folder.path("target")]
        let theirs = try run("qemu-img", words)
        let own = try run(Swimg.path, words)
        #expect(own.status == 1 && theirs.status == 1, "\(own)\n\(theirs)")
        let reason = try #require(theirs.errorText.components(separatedBy: "': ").last)
        #expect(own.errorText.hasSuffix(": " + reason), "\(own)\n\(theirs)")
        #expect(own.errorText.split(separator: "\n").count == 1)
        #expect(!own.errorText.contains("wrong"), "\(own)")
        #expect(!FileManager.default.fileExists(atPath: folder.path("target")))
        let check = try run(
            Swimg.path,
            ["compare"] + secret + (name == "FILE" ? [] : ["--image-opts"]) + [given, given])
        #expect(check.status == 2 && check.errorText.hasSuffix(": " + reason), "\(check)")
    }

    @Test(arguments: [
        "secret,id=s", "secret,id=s,data=swordfish,file=b", "secret,id=s,file=nothere",
        "secret,id=s,data=swordfis%,format=base64", "secret,data=swordfish",
        "secret,id=s,data=swordfish,foo=1", "secret,id=s,data=swordfish,format=hex",
        "secret,id=s,data=YW,format=base64", "secret,id=s,data=swordfish,keyid=x",
        #"{"qom-type":"secret""#,
    ])
    func badSecrets(_ object: String) throws {
        try writeFilled(folder.path("raw"), byte: 1, count: 512)
        for verb in [["convert", "-O", "raw"], ["compare"], ["create", "-f", "qcow2"]] {
            let own = try run(
                Swimg.path, verb + ["--object", object, "raw", "x"], in: folder.path)
            #expect([1, 2].contains(own.status), "\(own)")
            #expect(own.errorText.split(separator: "\n").count == 1, "\(own)")
            #expect(!own.errorText.contains("swordfish"), "\(own)")
            #expect(folder.names == ["raw"])
        }
    }

    @Test func duplicateAndOddSecrets() throws {
        let path = try image("luks")
        let object = ["--object", "secret,id=s,data=a"]
        let own = try run(Swimg.path, ["info"] + object + object + [path])
        #expect(own.status == 1 && own.errorText.contains("duplicate"), "\(own)")
        // No secret, and ignored.
        try require(Swimg.path, ["info", "--object", "tls-creds-psk,id=s,dir=/x", path])
        let binary = try folder.write("binary", [0x61, 0xff])
        let refused = try run(
            Swimg.path,
            ["check", "--object", "secret,id=s,file=\(binary)", "--image-opts"]
                + [EncryptedImage.options("luks", path)])
        #expect(refused.errorText.contains("Data from secret s is not valid UTF-8"), "\(refused)")
    }

    /// Headers that cryptsetup makes, with a second key.
    @Test(
        .enabled(if: hasProgram("cryptsetup"), "the judge is cryptsetup"),
        arguments: [
            "aes-xts-plain64 -s 512", "aes-cbc-essiv:sha256 -s 192", "aes-cbc-plain -s 128",
        ])
    func madeByCryptsetup(_ cipher: String) throws {
        let path = folder.path("image")
        try Qemu.img("create", "-q", "-f", "raw", path, "6M")
        let (one, two) = (
            try folder.write("one", Array("first".utf8)),
            try folder.write("two", Array("second".utf8))
        )
        let quick = ["-q", "--iter-time", "10", "--key-file", one]
        try require(
            "cryptsetup",
            ["luksFormat", "--type", "luks1", "--cipher"] + cipher.words + quick + [path])
        try require("cryptsetup", ["luksAddKey"] + quick + [path, two])
        for (file, status) in [(one, 63), (two, 63), (path, 1)] as [(String, Int32)] {
            let own = try run(
                Swimg.path,
                ["check", "--object", "secret,id=s,file=\(file)", "--image-opts"]
                    + [EncryptedImage.options("luks", path)])
            #expect(own.status == status, "\(own)")
        }
        try expectSame(["info", "--output=json", path])
    }
}
