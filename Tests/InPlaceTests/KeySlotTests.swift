import Foundation
import TestSupport
import Testing

/// Key slots that `amend` adds and erases, judged by qemu-img, qemu-io and cryptsetup.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct KeySlotTests {
    /// The secrets `a`, `b` and `c` besides that of the images, `s`.
    private static let secrets =
        EncryptedImage.secret
        + ["a", "b", "c"].flatMap { ["--object", "secret,id=\($0),data=hunter-\($0)"] }

    private let folder: TempFolder

    init() throws { folder = try TempFolder() }

    private func make(_ format: String) throws -> String {
        let path = folder.path("image")
        try EncryptedImage.make(format, path, size: "2M")
        try EncryptedImage.io(format, path, ["write -P 7 0 2M"])
        return path
    }

    private func description(_ format: String, _ path: String, secret: String) -> String {
        EncryptedImage.options(format, path).replacingOccurrences(of: "=s,", with: "=\(secret),")
    }

    /// The words of a command line; a line is `SECRET OPTIONS WORDS…`, without prefixes.
    private func amendWords(_ line: String, _ format: String, _ path: String) -> [String] {
        let words = line.words
        let prefix = EncryptedImage.prefix(format)
        let options = words[1].split(separator: ",").map { prefix + $0 }.joined(separator: ",")
        return ["amend"] + Self.secrets + words.dropFirst(2)
            + ["-o", options, "--image-opts", description(format, path, secret: words[0])]
    }

    /// The numbers of the active slots, as qemu-img shows them.
    private func slots(_ format: String, _ path: String) throws -> [Int] {
        let details = try #require(
            info(path, format)["format-specific"] as? NSDictionary)
        let data = try #require(details["data"] as? NSDictionary)
        let luks = format == "luks" ? data : try #require(data["encrypt"] as? NSDictionary)
        let slots = try #require(luks["slots"] as? [NSDictionary])
        return slots.indices.filter { slots[$0]["active"] as? Bool == true }
    }

    /// The secrets of `sabc` that open the image, to qemu-io and to this program.
    private func openers(_ format: String, _ path: String) throws -> String {
        try "sabc".map(String.init).filter { secret in
            let image = description(format, path, secret: secret)
            let theirs = try run(
                "qemu-io", Self.secrets + ["-c", "read -P 7 0 2M", "--image-opts", image])
            let own = try run(
                Swimg.path,
                ["convert"] + Self.secrets + ["-O", "raw", "--image-opts", image]
                    + [folder.path("disk")])
            #expect(own.isSuccess == theirs.isSuccess, "\(own)\n\(theirs)")
            if !own.isSuccess { #expect(own.errorText.contains("Invalid password"), "\(own)") }
            return theirs.isSuccess && !theirs.outputText.contains("ailed")
        }.joined()
    }

    @Test(arguments: ["luks", "qcow2"])
    func changes(_ format: String) throws {
        let path = try make(format)
        for (line, active, open) in [
            ("s state=active,new-secret=a,iter-time=10", [0, 1], "sa"),
            ("a state=active,new-secret=b,iter-time=10,keyslot=6", [0, 1, 6], "sab"),
            ("b state=inactive,keyslot=0", [1, 6], "ab"),
            ("b state=active,new-secret=b,iter-time=0", [0, 1, 6], "ab"),
            ("b state=inactive,keyslot=1,old-secret=a", [0, 6], "b"),
            // Its own slot, which another key replaces.
            ("b state=active,new-secret=c,iter-time=10,keyslot=6 --force", [0, 6], "bc"),
            ("c state=inactive,old-secret=b -p", [6], "c"),
            ("c state=active,new-secret=s,iter-time=10,keyslot=6 --force", [6], "s"),
            ("s state=inactive,keyslot=3 --force", [6], "s"),
            ("s state=inactive,old-secret=s --force", [], ""),
        ] {
            let own = try run(Swimg.path, amendWords(line, format, path))
            #expect(own.isSuccess && own.errors.isEmpty, "\(own)")
            #expect(own.output.isEmpty != line.hasSuffix("-p"), "\(own)")
            #expect(try slots(format, path) == active, "\(line)")
            #expect(try openers(format, path) == open, "\(line)")
        }
    }

    /// A full header, and keys that qemu-img adds and erases.
    @Test(arguments: ["luks", "qcow2"])
    func together(_ format: String) throws {
        let path = try make(format)
        for _ in 1...7 {
            try require(
                Swimg.path, amendWords("s state=active,new-secret=a,iter-time=0", format, path))
        }
        let more = amendWords("a state=active,new-secret=b,iter-time=0 --force", format, path)
        let own = try run(Swimg.path, more)
        #expect(own.errorText.hasSuffix("all keyslots are in use\n") && own.status == 1, "\(own)")
        // No slot is free to hold the key meanwhile.
        try require(
            Swimg.path,
            amendWords("s state=active,new-secret=b,iter-time=0,keyslot=0 --force", format, path))
        #expect(try slots(format, path) == Array(0...7))
        try require("qemu-img", amendWords("b state=inactive,old-secret=a", format, path))
        try require(
            "qemu-img",
            amendWords("b state=active,new-secret=c,iter-time=10", format, path))
        try require(Swimg.path, amendWords("c state=inactive,old-secret=b", format, path))
        #expect(try slots(format, path) == [1])
        if format == "qcow2" {
            let image = description(format, path, secret: "c")
            try require("qemu-img", ["check"] + Self.secrets + ["--image-opts", image])
        }
        #expect(try openers(format, path) == "c")
    }

    /// The words of qemu-img, and an image that stays as it was.
    @Test(arguments: ["luks", "qcow2"])
    func refusals(_ format: String) throws {
        let path = try make(format)
        let before = try contents(path)
        for line in [
            "s state=foo,keyslot=1", "s keyslot=1", "s iter-time=10", "s state=active",
            "s state=active,new-secret=x", "s state=active,new-secret=a,old-secret=s",
            "s state=active,new-secret=a,keyslot=8", "s state=active,new-secret=a,keyslot=x",
            "s state=active,new-secret=a,keyslot=0", "s state=inactive",
            "s state=inactive,new-secret=a", "s state=inactive,iter-time=10",
            "s state=inactive,old-secret=x", "s state=inactive,old-secret=a",
            "s state=inactive,old-secret=a,keyslot=0", "s state=inactive,old-secret=a,keyslot=3",
            "s state=inactive,keyslot=9", "s state=inactive,keyslot=3",
            "s state=inactive,keyslot=0", "s state=inactive,old-secret=s",
            "s state=inactive,old-secret=a --force", "s state=active,new-secret=",
            "x state=inactive,keyslot=0", "a state=inactive,keyslot=0 --force",
        ] {
            let words = amendWords(line, format, path)
            let (own, theirs) = (try run(Swimg.path, words), try run("qemu-img", words))
            #expect(
                own.status == 1 && theirs.status == 1 && own.output.isEmpty, "\(own)\n\(theirs)")
            let said = try #require(theirs.errorText.split(separator: ": ").last)
            #expect(
                own.errorText.trimmed.hasSuffix(String(said).trimmed), "\(own)\n\(theirs)")
            #expect(!own.errorText.contains("hunter") && !own.errorText.contains("horse"))
            #expect(try contents(path) == before, "\(line)")
        }
        let late = try run(
            Swimg.path, amendWords("s state=active,new-secret=a,iter-time=-1", format, path))
        #expect(late.errorText.contains("too large to scale") && late.status == 1, "\(late)")
        #expect(try contents(path) == before)
    }

    @Test func otherEncryption() throws {
        try Qemu.img("create", "-q", "-f", "qcow2", folder.path("plain"), "1M")
        try require(
            "qemu-img",
            ["create", "-q", "-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=s"]
                + EncryptedImage.secret + [folder.path("aes"), "1M"])
        for words in [
            ["-f", "qcow2", folder.path("plain")],
            ["--image-opts", EncryptedImage.options("qcow2", folder.path("aes"))],
            ["--image-opts", EncryptedImage.options("qcow2", folder.path("aes")), "-q"],
        ] {
            for option in ["encrypt.state=active,encrypt.new-secret=a", "encrypt.format=luks"] {
                let words = ["amend"] + Self.secrets + ["-o", option] + words
                let (own, theirs) = (try run(Swimg.path, words), try run("qemu-img", words))
                #expect(own.status == 1 && theirs.status == 1, "\(own)\n\(theirs)")
                let said = try #require(theirs.errorText.split(separator: "\n").first)
                #expect(own.errorText.contains(said.dropFirst("qemu-img: ".count)), "\(own)")
            }
        }
    }

    /// A copy of the header of old times is worth nothing: the key itself is gone.
    @Test func erasedMaterialIsOverwritten() throws {
        let path = try make("luks")
        let header = try contents(path).prefix(4096)
        for line in ["s state=active,new-secret=a,iter-time=0", "a state=inactive,keyslot=0"] {
            try require(Swimg.path, amendWords(line, "luks", path))
        }
        var bytes = try contents(path)
        bytes.replaceSubrange(0..<4096, with: header)
        try bytes.write(to: URL(fileURLWithPath: path))
        #expect(try slots("luks", path) == [0])
        #expect(try openers("luks", path) == "")
    }

    @Test(.enabled(if: hasProgram("cryptsetup"), "the judge is cryptsetup"))
    func withCryptsetup() throws {
        let path = try make("luks")
        let keys = try ["a", "b", "c"].map { try folder.write($0, Array("hunter-\($0)".utf8)) }
        func opens(_ key: String) throws -> Bool {
            try run("cryptsetup", ["open", "--test-passphrase", path, "--key-file", key]).isSuccess
        }
        func dumped() throws -> [Int] {
            let dump = try require("cryptsetup", ["luksDump", path])
            return (0...7).filter { dump.contains("Key Slot \($0): ENABLED") }
        }
        try require(
            Swimg.path,
            amendWords("s state=active,new-secret=a,iter-time=10,keyslot=5", "luks", path))
        #expect(try dumped() == [0, 5] && opens(keys[0]))
        let quick = ["-q", "--iter-time", "10", "--key-file", keys[0]]
        try require("cryptsetup", ["luksAddKey"] + quick + [path, keys[1]])
        try require(Swimg.path, amendWords("b state=inactive,old-secret=a", "luks", path))
        #expect(try dumped() == [0, 1] && !opens(keys[0]) && opens(keys[1]))
        try require(
            Swimg.path,
            amendWords("b state=active,new-secret=c,iter-time=10,keyslot=1 --force", "luks", path))
        #expect(try dumped() == [0, 1] && !opens(keys[1]) && opens(keys[2]))
        try require("cryptsetup", ["luksKillSlot", "-q", path, "0", "--key-file", keys[2]])
        #expect(try openers("luks", path) == "c")
    }

    @Test(arguments: [["-f", "luks"], ["-f", "qcow2"]])
    func optionsAreListed(_ format: [String]) throws {
        let words = ["amend"] + format + ["-o", "help"]
        #expect(try require(Swimg.path, words) == (try require("qemu-img", words)))
    }
}

extension String {
    fileprivate var trimmed: String { trimmingCharacters(in: .whitespacesAndNewlines) }
}
