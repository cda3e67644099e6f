import Foundation
import Glibc
import TestSupport
import Testing

/// `info` must match qemu-img's byte for byte in both forms, as must the exit status.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct InfoTests {
    /// Intended differences.
    static let ownAnswer: [String: String] = [
        "bad-encrypted-no-header.qcow2": "qemu-img crashes",
        "a-fifo": "qemu-img waits for ever",
        "bad-backing-missing-escapes.qcow2": "control characters are replaced in the human form",
        "stale-bitmaps.qcow2": "qemu-img warns on stderr",
    ]

    @Test(arguments: Fixture.all)
    func fixture(_ fixture: Fixture) throws {
        guard Self.ownAnswer[fixture.file] == nil else { return }
        try compareInfo([fixture.path()], at: #_sourceLocation)
    }

    @Test func namesCannotReachTheTerminal() throws {
        let path = try Fixture.folderOfImages() + "/bad-backing-missing-escapes.qcow2"
        let outcome = try run(Swimg.path, ["info", path])
        #expect(outcome.isSuccess, "\(outcome)")
        let lines = outcome.outputText.split(separator: "\n")
        let theirs = try Qemu.img("info", path)
        #expect(lines.contains { $0.hasPrefix("backing file: ?[31mred?") }, "\(outcome)")
        #expect(!outcome.output.contains(0x1b) && theirs.utf8.contains(0x1b), "\(outcome)")
        // Programs get the unmodified name.
        try compareInfo(["--output=json", path], forms: [[]], at: #_sourceLocation)
    }

    @Test func refusesWhereQemuImgCrashes() throws {
        let path = try Fixture.folderOfImages() + "/bad-encrypted-no-header.qcow2"
        let outcome = try run(Swimg.path, ["info", path])
        #expect(outcome.status == 1 && outcome.output.isEmpty, "\(outcome)")
        #expect(outcome.errorText.contains("LUKS"), "\(outcome)")
    }

    static let created = [
        "", "compat=0.10", "cluster_size=512", "cluster_size=2M", "refcount_bits=1",
        "refcount_bits=64", "lazy_refcounts=on", "compression_type=zstd", "extended_l2=on",
        "preallocation=metadata", "data_file=DATA", "data_file=DATA,data_file_raw=on",
        "encrypt.format=aes,encrypt.key-secret=s",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100,encrypt.cipher-alg=aes-128,"
            + "encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
    ]

    @Test(arguments: created)
    func madeByQemuImg(_ options: String) throws {
        let folder = try TempFolder()
        let path = folder.path("image.qcow2")
        try Qemu.img("create", "-q", "-f", "raw", folder.path("base.raw"), "3M")
        let all = options.replacingOccurrences(of: "DATA", with: folder.path("data"))
        // Neither raw external data nor preallocation allows a backing file.
        let backing =
            options.contains("raw") || options.contains("preallocation")
            ? [] : ["-b", "base.raw", "-F", "raw"]
        let secret = ["--object", "secret,id=s,data=abc"]
        let line =
            ["create", "-q", "-f", "qcow2"] + secret + backing
            + (all.isEmpty ? [] : ["-o", all]) + [path, "1610612736"]
        try require("qemu-img", line)
        if !options.contains("encrypt"), !options.contains("DATA") {
            try Qemu.img("snapshot", "-c", "first", path)
            try Qemu.img("snapshot", "-c", "one with a long name: \u{fc}", path)
        }
        try compareInfo([path], at: #_sourceLocation)
        try compareInfo(["-U", path, "-f", "qcow2"], at: #_sourceLocation)
        try compareInfo(["-f", "raw", path], at: #_sourceLocation)
        try compareInfo(["image.qcow2"], in: folder.path, at: #_sourceLocation)
    }

    @Test func bitmaps() throws {
        let folder = try TempFolder()
        let path = folder.path("image.qcow2")
        try Qemu.img("create", "-q", "-f", "qcow2", path, "10M")
        try Qemu.img("bitmap", "--add", path, "one")
        try Qemu.img("bitmap", "--add", "--disable", "-g", "128k", path, "and two")
        try compareInfo([path], at: #_sourceLocation)
    }

    @Test func chains() throws {
        let folder = try TempFolder()
        _ = try folder.makeFolder("sub")
        try Qemu.img("create", "-q", "-f", "raw", "base.raw", "1M", in: folder.path)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", "sub/middle.qcow2",
            in: folder.path)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", folder.path("sub/middle.qcow2"), "-F", "qcow2",
            "top.qcow2", in: folder.path)
        for words in [["--backing-chain"], []] {
            try compareInfo(words + ["top.qcow2"], in: folder.path, at: #_sourceLocation)
            try compareInfo(words + ["sub/middle.qcow2"], in: folder.path, at: #_sourceLocation)
        }
        let images = try Fixture.folderOfImages()
        for name in ["backing-loop-a", "backing-self", "backing-missing", "backing-format-unknown"]
        {
            try compareInfo(
                ["--backing-chain", "bad-\(name).qcow2"], in: images, at: #_sourceLocation)
        }
    }

    @Test(arguments: [[], ["a", "b"], ["--output=xml", "a"], ["-f", "nosuch", "a"], ["nosuch"]])
    func refusedCommandLines(_ words: [String]) throws {
        let folder = try TempFolder()
        try DiskSketch("A").writeRaw(folder.path("a"))
        try compareInfo(words, in: folder.path, forms: [[]], at: #_sourceLocation)
    }

    @Test(.enabled(if: NBDTestServer.isInstalled, "qemu-nbd and nbdkit"))
    func exports() throws {
        let folder = try TempFolder()
        let path = folder.path("image.qcow2")
        try Qemu.img("create", "-q", "-f", "raw", folder.path("base.raw"), "3M")
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path, "16M")
        let raw = try NBDTestServer.qemu("-f", "qcow2", "-r", path)
        try compareInfo([raw.uri], at: #_sourceLocation)
        try compareInfo(["nbd:unix:\(raw.socket)"], at: #_sourceLocation)
        let bare = try NBDTestServer.qemu("-f", "raw", "-r", "-x", "an export", path)
        try compareInfo(
            ["nbd+unix:///an%20export?socket=\(bare.socket)"], at: #_sourceLocation)
    }

    /// Services limit memory to one gibibyte and time to two seconds for untrusted images.
    @Test(arguments: HostileHeader.all)
    func hostileHeaderIsAnsweredOrRefused(_ header: HostileHeader) throws {
        let folder = try TempFolder()
        let path = folder.path("image.qcow2")
        try header.write(path, like: Fixture.folderOfImages() + "/bitmap.qcow2")
        for form in ["human", "json"] {
            let outcome = try run(
                "prlimit",
                ["--as=1073741824", "--cpu=2", Swimg.path, "info", "--output=\(form)", path])
            #expect(outcome.status == (header.isFine ? 0 : 1), "\(outcome)")
            #expect(outcome.output.isEmpty == !header.isFine, "\(outcome)")
        }
    }

    @Test(.enabled(if: !osloForms.isEmpty, "oslo.utils is not installed"), arguments: osloForms)
    func osloUtilsUnderstands(_ form: String) throws {
        let folder = try TempFolder()
        let path = folder.path("image.qcow2")
        try Qemu.img("create", "-q", "-f", "raw", folder.path("base.raw"), "3M")
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path, "1610612736")
        try Qemu.img("snapshot", "-c", "first", path)
        let script = """
            import sys
            from oslo_utils import imageutils
            text = open(sys.argv[1]).read()
            i = imageutils.QemuImgInfo(text, format=sys.argv[2])
            print([i.image, i.file_format, i.virtual_size, i.cluster_size, i.disk_size,
                   i.backing_file, i.backing_file_format, len(i.snapshots), i.encrypted])
            """
        func parsed(_ program: String) throws -> String {
            let text = try require(program, ["info", "--output=\(form)", path])
            let file = try folder.write("text", Array(text.utf8))
            return try require(debianPython, ["-c", script, file, form])
        }
        #expect(try parsed(Swimg.path) == parsed("qemu-img"))
    }
}

/// The forms that the installed oslo.utils reads; newer versions read JSON only.
let osloForms = ["human", "json"].filter { form in
    let script = "from oslo_utils import imageutils; imageutils.QemuImgInfo('', format='\(form)')"
    let text = form == "json" ? script.replacingOccurrences(of: "''", with: "'{}'") : script
    return access(debianPython, X_OK) == 0
        && ((try? run(debianPython, ["-c", text]).isSuccess) ?? false)
}

/// The interpreter of Debian's packages, whatever comes first in PATH.
private let debianPython = "/usr/bin/python3"

/// Expects qemu-img's exit status and, on success, its output; no errors unless qemu-img prints
/// some.
func compareInfo(
    _ words: [String], in folder: String? = nil,
    forms: [[String]] = [[], ["--output=json"]], at location: SourceLocation
) throws {
    for form in forms {
        let theirs = try run("qemu-img", ["info"] + form + words, in: folder)
        let own = try run(Swimg.path, ["info"] + form + words, in: folder)
        #expect(own.status == theirs.status, "\(own)\n\(theirs)", sourceLocation: location)
        let text = withoutChildren(own.outputText)
        #expect(text == theirs.outputText, "\(theirs)", sourceLocation: location)
        #expect(own.errors.isEmpty == theirs.errors.isEmpty, "\(own)", sourceLocation: location)
    }
}

/// One header field with a value that an attacker could write.
struct HostileHeader: Sendable, CustomStringConvertible {
    let description: String
    let offset: Int
    let bytes: [UInt8]
    /// In bytes; nil keeps the file's length.
    var fileSize: UInt64?
    /// The value is valid, only large.
    var isFine = false

    private init(
        _ name: String, _ offset: Int, _ number: UInt64, bits: Int = 32, fileSize: UInt64? = nil,
        isFine: Bool = false
    ) {
        description = "\(name) \(number), file \(fileSize ?? 0)"
        self.offset = offset
        bytes = (0..<bits / 8).reversed().map {
            UInt8(truncatingIfNeeded: number >> UInt64($0 * 8))
        }
        self.fileSize = fileSize
        self.isFine = isFine
    }

    static let all = [
        HostileHeader("L1 entries", 36, 0xffff_ffff),
        HostileHeader("L1 entries", 36, 4 << 20, isFine: true),
        HostileHeader("L1 entries", 36, 4 << 20, fileSize: 1 << 40, isFine: true),
        HostileHeader("L1 offset", 40, .max, bits: 64),
        HostileHeader("virtual size", 24, 1 << 63, bits: 64),
        HostileHeader("virtual size", 24, 1 << 60, bits: 64),
        HostileHeader("snapshots", 60, 0xffff_ffff, fileSize: 1 << 40),
        HostileHeader("snapshots", 60, 65536),
        HostileHeader("snapshot offset", 64, .max, bits: 64),
        HostileHeader("header length", 100, 0xffff_fff8),
        HostileHeader("cluster bits", 20, 63),
        HostileHeader("refcount table clusters", 56, 0xffff_ffff, fileSize: 1 << 40),
        HostileHeader("refcount table offset", 48, .max, bits: 64),
        HostileHeader("length of the first extension", 116, 0xffff_ffff),
    ]

    func write(_ path: String, like model: String) throws {
        var data = try contents(model)
        data.replaceSubrange(offset..<offset + bytes.count, with: bytes)
        try data.write(to: URL(fileURLWithPath: path))
        guard let fileSize else { return }
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
        try file.truncate(atOffset: fileSize)
        try file.close()
    }
}
