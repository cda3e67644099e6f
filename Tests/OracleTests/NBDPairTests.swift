import Foundation
import TestSupport
import Testing

/// Every kind of server with every other kind, and filters that add limitations.
@Suite(
    .enabled(if: Qemu.isInstalled && NBDTestServer.isInstalled, "needs qemu-nbd and nbdkit"))
struct NBDPairTests {
    static let size = 24 << 20
    let folder: TempFolder

    init() throws { folder = try TempFolder() }

    static let sources = ["file", "qemu", "memory", "sparse-random", "data", "null", "pattern"]
    static let targets = ["file", "qemu", "memory", "data", "null"]

    private func file(_ name: String, filledWith byte: UInt8) throws -> String {
        let path = folder.path(name)
        try Data(repeating: byte, count: Self.size).write(to: URL(fileURLWithPath: path))
        return path
    }

    private func source(_ kind: String, _ filters: [String] = []) throws -> NBDTestServer {
        let size = "size=\(Self.size)"
        let plugin: [String]
        switch kind {
        case "file", "qemu":
            let path = try file("source", filledWith: 0x11)
            // A hole next to other holes, and data that begins within a block.
            try Qemu.io("raw", path, ["write -z -u 5M 9M", "write -P 7 6291000 70000"])
            if kind == "qemu" { return try NBDTestServer.qemu("-f", "raw", path) }
            plugin = ["file", path]
        case "data": plugin = ["data", "( 0x11*600000 @0x400000 0x22*5000 @0x1000001 0x33 )", size]
        case "memory":
            let server = try NBDTestServer.nbdkit("memory", "\(Self.size)")
            try Qemu.io("raw", server.uri, ["write -P 9 1M 3000000", "write -P 7 6291000 70000"])
            return server
        case "null": plugin = ["null", size]
        case "pattern": plugin = ["pattern", size]
        default: plugin = ["sparse-random", size, "seed=3", "percent=40", "runlength=98304"]
        }
        return try NBDTestServer.nbdkit(
            filters.filter { $0.hasPrefix("-") } + plugin
                + filters.filter { !$0.hasPrefix("-") })
    }

    @Test(arguments: sources, targets)
    func copiesFromEachToEach(_ from: String, _ to: String) throws {
        let source = try source(from)
        let target =
            switch to {
            case "memory": try NBDTestServer.nbdkit("memory", "\(Self.size)")
            case "data":
                try NBDTestServer.nbdkit("data", "@0x5ff0 0xaa*300000", "size=\(Self.size)")
            case "null": try NBDTestServer.nbdkit("null", "size=\(Self.size)")
            case "qemu":
                try NBDTestServer.qemu("-f", "raw", try file("target", filledWith: 0xaa))
            default: try NBDTestServer.nbdkit("file", try file("target", filledWith: 0xaa))
            }
        let outcome = try Swimg.convert(
            "-n", "-f", "raw", "-O", "raw", source.uri, target.uri)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        // Data written to null cannot be read back.
        guard to != "null" || from == "null" else { return }
        #expect(try Qemu.difference(source.uri, "raw", target.uri, "raw") == nil)
    }

    /// Answers that are late, in small pieces, without a map or only successful at a retry.
    @Test(arguments: [
        ["--filter=delay", "rdelay=2ms"],
        ["--filter=noextents"],
        ["--filter=noparallel", "serialize=connections"],
        ["--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-preferred=1M"],
        ["--filter=blocksize-policy", "blocksize-maximum=8192", "blocksize-error-policy=error"],
        [
            "--filter=retry-request", "--filter=error", "retry-request-delay=1",
            "retry-request-retries=8", "error-rate=5%",
        ],
        ["--filter=retry", "--filter=error", "retry-delay=1", "error-pread-rate=0.5%"],
        ["--filter=multi-conn", "multi-conn-mode=disable"],
    ])
    func readsFromAwkwardServers(_ filters: [String]) throws {
        let source = try source("sparse-random", filters)
        let plain = try self.source("sparse-random")
        let target = folder.path("target")
        let outcome = try Swimg.convert("-f", "raw", "-O", "raw", source.uri, target)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try Qemu.difference(plain.uri, "raw", target, "raw") == nil)
    }

    /// checkwrite accepts only the data that the plugin would return, so each write is verified.
    @Test(arguments: [
        [], ["--connections", "1"], ["--connections", "8", "--requests", "16"], ["--multi-conn"],
    ])
    func writesExactlyWhatIsThere(_ options: [String]) throws {
        let source = try source("sparse-random")
        let target = try self.source("sparse-random", ["--filter=checkwrite"])
        let outcome = try Swimg.convert(
            options + ["-n", "-f", "raw", "-O", "raw", source.uri, target.uri])
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        // Shows that checkwrite does refuse wrong data.
        let other = try NBDTestServer.nbdkit(
            "--filter=checkwrite", "sparse-random", "size=\(Self.size)", "seed=4",
            "percent=40", "runlength=98304")
        let refused = try Swimg.convert(
            options + ["-n", "-f", "raw", "-O", "raw", source.uri, other.uri])
        #expect(refused.status == 1, "\(refused)")
    }

    /// Zeroing uses the cheapest request that the server supports; a trimmed range counts as zero
    /// only if the block status confirms it.
    @Test(arguments: [
        // The server's abilities, and the requests that it should get, in this order.
        (["zeromode=plugin", "fastzeromode=default"], ["fast"]),
        (["zeromode=plugin", "fastzeromode=none"], ["plain"]),
        (["zeromode=plugin", "fastzeromode=slow"], ["fast", "trim", "status"]),
        // nbdkit refuses fast zeroing before the request reaches the log.
        (["zeromode=emulate", "fastzeromode=slow"], ["trim", "status"]),
        (["zeromode=none"], ["trim", "status"]),
    ])
    func zerosByTheCheapestMeans(_ means: [String], _ expected: [String]) throws {
        let source = try islands(32, in: 8 << 20)
        let log = folder.path("log")
        let target = try NBDTestServer.nbdkit(
            ["--filter=log", "--filter=nozero", "memory", "\(Self.size)", "logfile=\(log)"] + means)
        try Qemu.io("raw", target.uri, ["write -P 0xaa 0 \(Self.size)"])
        let outcome = try Swimg.convert(
            "-n", "-m", "1", "--connections", "1", "-f", "raw", "-O", "raw", source, target.uri)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        let asked = try Self.zeroing(log)
        var firsts: [String] = []
        for name in asked where !firsts.contains(name) { firsts.append(name) }
        #expect(firsts == expected, "\(asked)")
        // A request refused a few times is not repeated, except those already in flight.
        let fast = asked.count { $0 == "fast" }
        #expect(!expected.contains("trim") || fast <= 9, "\(asked)")
        let wanted = try file("wanted", filledWith: 0xaa)
        try Qemu.io(
            "raw", wanted, ["write -P 0 0 8M"] + (0..<32).map { "write -P 3 \($0 * 256)k 64k" })
        #expect(try Qemu.difference(wanted, "raw", target.uri, "raw") == nil)
    }

    /// Request lengths that are not multiples of any cluster size.
    @Test(arguments: ["raw", "qcow2"])
    func oddRequestSizes(_ format: String) throws {
        let source = try source("sparse-random")
        let target = folder.path("target")
        let outcome = try Swimg.convert(
            "--request-size", "100k", "-f", "raw", "-O", format, source.uri, target)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try Qemu.difference(source.uri, "raw", target, format) == nil)
        let other = try self.source(
            "sparse-random", ["--filter=blocksize-policy", "blocksize-maximum=100000"])
        let second = try Swimg.convert("-f", "raw", "-O", format, other.uri, target)
        #expect(second.isSuccess && second.errors.isEmpty, "\(second)")
        #expect(try Qemu.difference(source.uri, "raw", target, format) == nil)
    }

    /// Zeros are written to ranges that the server keeps despite a trim or refuses to trim.
    @Test(arguments: [("exit 0", 8), ("echo EPERM >&2; exit 1", 1)])
    func writesZerosOverWhatIsKept(_ trim: String, _ least: Int) throws {
        let export = try file("target", filledWith: 0xaa)
        let log = folder.path("log")
        let dd = "dd of=\(export) conv=notrunc iflag=count_bytes oflag=seek_bytes status=none"
        let target = try NBDTestServer.nbdkit(
            "--filter=log", "eval", "logfile=\(log)", "get_size=echo \(Self.size)",
            "pread=dd if=\(export) iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
            "pwrite=\(dd) seek=$4 count=$3", "can_write=exit 0", "can_trim=exit 0",
            "trim=\(trim)", "can_extents=exit 0", "extents=echo $4 $3 0", "can_zero=exit 3")
        let source = try islands(40, in: Self.size)
        let outcome = try Swimg.convert(
            "-n", "-m", "1", "--connections", "1", "-f", "raw", "-O", "raw", source, target.uri)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try Qemu.difference(source, "raw", export, "raw") == nil)
        // Tried a few times, by at most two workers at once, and not for each range.
        let trims = try Self.zeroing(log).count { $0 == "trim" }
        #expect((least...least + 1).contains(trims), "\(trims) of 40")
    }

    /// A sparse disk with 64 KiB of data at regular distances.
    private func islands(_ count: Int, in size: Int) throws -> String {
        let path = try folder.write("islands", [])
        let file = try #require(FileHandle(forWritingAtPath: path))
        try file.truncate(atOffset: UInt64(size))
        for island in 0..<count {
            try file.seek(toOffset: UInt64((island * (size / count)) & ~0xffff))
            try file.write(contentsOf: Data(repeating: 3, count: 1 << 16))
        }
        try file.close()
        return path
    }

    /// The zeroing requests in a log of nbdkit's filter, in the order of their start.
    private static func zeroing(_ log: String) throws -> [String] {
        try String(contentsOfFile: log, encoding: .utf8).split(separator: "\n").compactMap { line in
            let words = line.split(separator: " ")
            switch words.dropFirst(3).first {
            case "Zero": return words.contains("fast=1") ? "fast" : "plain"
            case "Trim": return "trim"
            case "Extents": return "status"
            default: return nil
            }
        }
    }

    /// Cache modes that require it make each write stable before the answer: with FUA, or with a
    /// flush afterwards if the server does not support FUA.
    @Test(arguments: ["writethrough", "directsync", "writeback"], [true, false])
    func writesThrough(_ mode: String, _ hasFlag: Bool) throws {
        let source = try source("data")
        let log = folder.path("log")
        let filters = ["--filter=log", "--filter=fua"]
        let target = try NBDTestServer.nbdkit(
            filters + ["memory", "\(Self.size)", "logfile=\(log)"]
                + (hasFlag ? ["fuamode=emulate"] : []))
        let outcome = try Swimg.convert(
            "-n", "-t", mode, "-f", "raw", "-O", "raw", "--connections", "1", source.uri, target.uri
        )
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        target.stop()
        let lines = try String(contentsOfFile: log, encoding: .utf8).split(separator: "\n")
        let changes = lines.filter {
            $0.contains(" Write ") || $0.contains(" Zero ")
        }
        let stable = changes.filter { $0.contains("fua=1") }
        let flushes = lines.filter { $0.contains(" Flush ") }
        #expect(changes.count >= 3)
        let isAsked = mode != "writeback"
        #expect(stable.count == (isAsked && hasFlag ? changes.count : 0), "\(lines)")
        #expect(flushes.count == (isAsked && !hasFlag ? changes.count + 1 : 1), "\(lines)")
    }

    /// The other verbs also take NBD names and answer as qemu-img does.
    @Test(arguments: [
        "info --output=json -f qcow2", "info -f qcow2", "info -f raw", "map --output=json -f qcow2",
        "map -f qcow2", "map --output=json -f raw", "check -f qcow2",
        "check --output=json -f qcow2", "measure -f qcow2 -O raw",
        "measure -f qcow2 -O qcow2 --output=json",
    ])
    func verbsTakeExports(_ line: String) throws {
        // On ext4, reserved unwritten space turns from a hole into data when any process reads it,
        // as parallel tests do. A copy has no such space.
        let image = folder.path("image")
        try require("cp", ["--sparse=always", SourceGallery.named("v3-64k").path, image])
        let server = try NBDTestServer.qemu("-r", "-f", "raw", image)
        let theirs = try require("qemu-img", line.words + [server.uri])
        let outcome = try run(Swimg.path, line.words + [server.uri])
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(
            !theirs.isEmpty && withoutChildren(outcome.outputText) == theirs,
            "\(outcome)\n\(theirs)")
    }

    @Test func comparesAndDigestsExports() throws {
        let image = try SourceGallery.named("v3-64k")
        let server = try NBDTestServer.qemu("-r", "-f", "raw", image.path)
        let line = ["compare", "-f", "qcow2", "-F", image.format, server.uri, image.path]
        #expect(try run(Swimg.path, line).outputText == "Images are identical.\n")
        let digests = try [server.uri, image.path].map {
            try require(Swimg.path, ["digest", "-f", "qcow2", $0]).prefix(64)
        }
        #expect(digests[0] == digests[1] && digests[0].count == 64)
    }

    @Test func anImageIsNotConvertedOntoItself() throws {
        let server = try NBDTestServer.nbdkit("memory", "\(Self.size)")
        let image = try SourceGallery.named("v3-64k")
        try require(Swimg.path, ["convert", "-f", "raw", "-O", "raw", image.path, server.uri])
        let before = try require("qemu-img", ["map", "-f", "raw", "--output=json", server.uri])
        for line in [
            "convert -f raw -O qcow2 {} {}", "convert -f qcow2 -O raw {} {}",
            "convert -f raw -O raw {} {} {}", "dd -f raw -O raw bs=64k skip=1 if={} of={}",
        ] {
            let words = line.replacingOccurrences(of: "{}", with: server.uri).words
            let outcome = try run(Swimg.path, words)
            #expect(
                outcome.status == 1 && outcome.errorText.contains("also the source"), "\(outcome)")
        }
        #expect(
            try require("qemu-img", ["map", "-f", "raw", "--output=json", server.uri]) == before)
        // A conversion of the export onto itself changes nothing.
        try require(Swimg.path, ["convert", "-f", "raw", "-O", "raw", server.uri, server.uri])
        #expect(try Qemu.difference(image.path, "qcow2", server.uri, "qcow2") == nil)
    }
}
