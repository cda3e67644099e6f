import Foundation
import TestSupport
import Testing

/// Overlays and backing files of which each has a secret of its own, or none.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct EncryptedChainTests {
    /// The format of an image, and how it is encrypted.
    enum Kind: String, CaseIterable, Sendable {
        case plain, raw, luks, encrypted, aes

        var format: String {
            switch self {
            case .plain, .encrypted, .aes: "qcow2"
            case .raw: "raw"
            case .luks: "luks"
            }
        }

        /// The options of `-o` that make the image with a secret.
        func creation(_ secret: String) -> [String] {
            switch self {
            case .plain, .raw: []
            case .luks: ["-o", "key-secret=\(secret),iter-time=10"]
            case .encrypted:
                ["-o", "encrypt.format=luks,encrypt.key-secret=\(secret),encrypt.iter-time=10"]
            case .aes: ["-o", "encrypt.format=aes,encrypt.key-secret=\(secret)"]
            }
        }

        /// The value of `--image-opts`, with a prefix for each key.
        func described(_ name: String, _ secret: String, _ prefix: String = "") -> String {
            let file = "\(prefix)driver=\(format),\(prefix)file.filename=\(name)"
            return switch self {
            case .plain, .raw: file
            case .luks: "\(file),\(prefix)key-secret=\(secret)"
            case .encrypted, .aes: "\(file),\(prefix)encrypt.key-secret=\(secret)"
            }
        }

        func json(_ name: String, _ secret: String) -> String {
            let members = described(name, secret).split(separator: ",").map { word in
                let sides = word.split(separator: "=", maxSplits: 1)
                return "\"\(sides[0])\":\"\(sides[1])\""
            }
            return "json:{\(members.joined(separator: ","))}"
        }
    }

    private static let secrets = (0...2).flatMap {
        ["--object", "secret,id=s\($0),data=hunter\($0)"]
    }
    private let folder: TempFolder

    init() throws { folder = try TempFolder() }

    private func make(
        _ kind: Kind, _ name: String, _ secret: String, _ size: String, over base: Kind? = nil,
        options: [String] = []
    ) throws {
        let words =
            ["create", "-q", "-f", kind.format] + Self.secrets + kind.creation(secret) + options
            + (base.map { ["-u", "-b", "base", "-F", $0.format] } ?? []) + [name, size]
        // qemu-img measures the processor for seconds, and this program cannot make the old ones.
        try require(kind == .aes ? "qemu-img" : Swimg.path, words, in: folder.path)
    }

    private func write(_ image: String, _ commands: [String]) throws {
        let output = try require(
            "qemu-io", Self.secrets + commands.flatMap { ["-c", $0] } + ["--image-opts", image],
            in: folder.path)
        if output.contains("ailed") { throw CommandError(description: output) }
    }

    /// An overlay `top` of a smaller `base`; the disk is in `disk` then.
    ///
    /// - Returns: the description of the overlay with its backing file.
    private func makeChain(_ top: Kind, _ base: Kind, options: [String] = []) throws -> String {
        try make(base, "base", "s0", "2M")
        try write(base.described("base", "s0"), ["write -P 1 0 2M"])
        try make(top, "top", "s1", "2999808", over: base, options: options)
        let image = top.described("top", "s1") + "," + base.described("base", "s0", "backing.")
        try write(
            image,
            [
                "write -P 2 100k 200k", "write -z 700k 128k", "write -z 150k 64k",
                "write -P 3 2500k 100k", "write -P 4 2990080 9728",
            ])
        try theirs(["convert", "-O", "raw", "--image-opts", image, "disk"])
        return image
    }

    @discardableResult
    private func theirs(_ words: [String]) throws -> String {
        try require(
            "qemu-img",
            [words[0]] + Self.secrets + Array(words.dropFirst()), in: folder.path)
    }

    private func own(_ words: [String], secrets: [String] = secrets) throws -> Outcome {
        try run(Swimg.path, [words[0]] + secrets + Array(words.dropFirst()), in: folder.path)
    }

    private func expectSuccess(
        _ words: [String], secrets: [String] = secrets, at place: SourceLocation = #_sourceLocation
    ) throws {
        let outcome = try own(words, secrets: secrets)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)", sourceLocation: place)
    }

    /// Expects an image to show the disk, and to be sound if it is a qcow2 image.
    private func expectDisk(
        _ image: String, isSound: Bool = true, at place: SourceLocation = #_sourceLocation
    ) throws {
        let words = ["--image-opts", image, "driver=raw,file.filename=disk"]
        let outcome = try run(
            "qemu-img", ["compare"] + Self.secrets + words, in: folder.path)
        #expect(outcome.isSuccess, "\(outcome)", sourceLocation: place)
        guard isSound else { return }
        try theirs(["check", "--image-opts", image])
    }

    @Test(arguments: [Kind.plain, .encrypted], [Kind.plain, .raw, .luks, .encrypted])
    func commits(_ top: Kind, _ base: Kind) throws {
        let image = try makeChain(top, base)
        try expectSuccess(["commit", "-q", "--image-opts", image])
        try expectDisk(base.described("base", "s0"), isSound: base.format == "qcow2")
        try expectDisk(image)
        // The overlay is empty.
        let map = try theirs(["map", "--output=json", "--image-opts", image])
        #expect(!map.contains("\"depth\": 0"), "\(map)")
    }

    @Test(arguments: [Kind.plain, .encrypted], [Kind.raw, .luks, .encrypted])
    func rebases(_ top: Kind, _ new: Kind) throws {
        let image = try makeChain(top, .encrypted)
        try make(new, "new", "s2", "2M")
        try write(new.described("new", "s2"), ["write -P 1 0 1M"])
        let name = new == .raw ? "new" : new.json("new", "s2")
        try expectSuccess(["rebase", "-b", name, "-F", new.format, "--image-opts", image])
        let alone = top.described("top", "s1")
        try expectDisk(alone)
        try expectDisk(alone + "," + new.described("new", "s2", "backing."))
        try expectSuccess(["rebase", "-b", "", "--image-opts", alone])
        try expectDisk(alone)
        #expect(try !theirs(["info", "--image-opts", alone]).contains("backing"))
    }

    /// The images of a chain of three: the secret of the new base is in the overlay's description.
    @Test func rebasesWithinTheChain() throws {
        let middle = try makeChain(.encrypted, .encrypted)
        try theirs(["create", "-q", "-f", "qcow2", "-u", "-b", "top", "-F", "qcow2", "over", "3M"])
        try theirs(["convert", "-O", "raw", "--image-opts", middle, "disk"])
        let below = middle.split(separator: ",").map { "backing.\($0)" }.joined(separator: ",")
        let image = "driver=qcow2,file.filename=over,\(below)"
        try write(image, ["write -P 9 1M 64k"])
        try theirs(["convert", "-O", "raw", "--image-opts", image, "disk"])
        try expectSuccess(["rebase", "-b", "base", "-F", "qcow2", "--image-opts", image])
        try expectDisk(
            "driver=qcow2,file.filename=over," + Kind.encrypted.described("base", "s0", "backing."))
        let deep = try own(["rebase", "-b", "top", "-F", "qcow2", "over"])
        #expect(deep.status == 1 && deep.errorText.contains("key-secret"), "\(deep)")
    }

    /// Both programs make the same image, but for the zeros that become noise in version 2 with
    /// qemu-img.
    @Test(
        arguments: [Kind.encrypted, .aes],
        ["compat=0.10", "refcount_bits=64", "lazy_refcounts=on", "size=3000320", "compat=1.1"])
    func amends(_ kind: Kind, _ way: String) throws {
        for options in [[], ["-o", "cluster_size=4k"]] {
            let image = try makeChain(kind, .plain, options: options)
            try expectSuccess(["amend", "-o", way, "--image-opts", image])
            if way.hasPrefix("size") {
                try FileManager.default.removeItem(atPath: folder.path("disk"))
                try theirs(["convert", "-O", "raw", "--image-opts", image, "disk"])
                let disk = try contents(folder.path("disk"))
                #expect(disk.count == 3_000_320 && disk.suffix(512).allSatisfy { $0 == 0 })
                #expect(disk[2_990_080..<2_999_808].allSatisfy { $0 == 4 })
            }
            try expectDisk(image)
            let wrong = try own(["amend", "-o", way, "top"])
            #expect(wrong.status == 1 && wrong.errorText.contains("is required"), "\(wrong)")
        }
    }

    /// Verbs that change tables need no secret, and keep what is encrypted as it is.
    @Test(arguments: [Kind.encrypted, .aes])
    func snapshotsAndBitmaps(_ kind: Kind) throws {
        let image = try makeChain(kind, .luks)
        let alone = kind.described("top", "s1")
        for words in [
            ["snapshot", "-c", "one", "top"], ["bitmap", "--add", "top", "b"],
            ["snapshot", "-c", "two", "--image-opts", alone], ["snapshot", "-d", "two", "top"],
        ] { try expectSuccess(words) }
        try write(image, ["write -P 9 0 1M"])
        let bitmap = ["bitmap", "--disable", "--image-opts", alone, "b"]
        try expectSuccess(bitmap)
        try expectSuccess(["bitmap", "--remove", "top", "b"])
        try expectSuccess(["snapshot", "-a", "one", "--image-opts", alone])
        try expectDisk(image)
    }

    /// As in qemu-img, nothing of the base is read.
    @Test(arguments: [Kind.luks, .encrypted, .aes])
    func createsWithoutTheSecretOfTheBase(_ base: Kind) throws {
        try make(base, "base", "s0", "2M")
        let words = ["create", "-f", "qcow2", "-b", "base", "-F", base.format, "top"]
        let judged = try theirs(words)
        let outcome = try own(words, secrets: [])
        #expect(outcome.isSuccess && outcome.outputText == judged, "\(outcome)")
        try expectSuccess(
            ["create", "-q", "-f", "qcow2", "-b", base.json("base", "s0"), "-F", base.format]
                + Kind.encrypted.creation("s1") + ["top"])
        // A new LUKS image holds noise.
        let read = base == .luks ? "read 1M 1M" : "read -P 0 1M 1M"
        try write(Kind.encrypted.described("top", "s1"), [read, "write -P 5 0 64k"])
        try writeFilled(folder.path("disk"), byte: 5, count: 1 << 20)
        try expectSuccess(
            ["convert", "-O", "qcow2", "-B", "base", "-F", base.format, "disk", "copy"],
            secrets: [])
        try expectSuccess(["info", "--backing-chain", "copy"], secrets: [])
    }

    /// The base is opened for its size; its content is asked for where it would show.
    @Test(arguments: [Kind.luks, .encrypted], some(2, of: ["1000448", "1M", "2M", "2000896"]))
    func resizesOverlays(_ base: Kind, _ size: String) throws {
        try make(base, "base", "s0", "2000896")
        try write(base.described("base", "s0"), ["write -P 1 0 2000896"])
        try make(.plain, "top", "", size, over: base)
        let needsSecret = size == "1000448"
        let image = "driver=qcow2,file.filename=top," + base.described("base", "s0", "backing.")
        let blind = try own(["resize", "top", "3M"])
        #expect(blind.isSuccess == !needsSecret, "\(blind)")
        if needsSecret {
            #expect(blind.errorText.contains("key-secret' is required"), "\(blind)")
            try expectSuccess(["resize", "-q", "--image-opts", image, "3M"])
        }
        let wrong = try own(
            ["resize", "--image-opts", image.replacingOccurrences(of: "=s0", with: "=s1"), "4M"])
        #expect(wrong.status == 1 && wrong.errorText.contains("Invalid password"), "\(wrong)")
        try theirs(["convert", "-O", "raw", "--image-opts", image, "disk"])
        let disk = try contents(folder.path("disk"))
        let end = try min(#require(bytes(size)), 2_000_896)
        #expect(disk.count == 3 << 20)
        #expect(disk[..<end].allSatisfy { $0 == 1 } && disk[end...].allSatisfy { $0 == 0 })
        try theirs(["check", "--image-opts", image])
    }

    private func bytes(_ size: String) -> Int? {
        ["1M": 1 << 20, "2M": 2 << 20][size] ?? Int(size)
    }

    /// Nothing is written into images of the old encryption, and the words are of use.
    @Test func writingIntoOldEncryption() throws {
        let image = try makeChain(.plain, .aes)
        let before = try contents(folder.path("base"))
        let outcome = try own(["commit", "--image-opts", image])
        #expect(outcome.status == 1 && outcome.errorText.contains("encrypted"), "\(outcome)")
        #expect(try contents(folder.path("base")) == before)
        try expectDisk(image)
    }
}
