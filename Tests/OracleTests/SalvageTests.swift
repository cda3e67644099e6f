import Foundation
import TestSupport
import Testing

/// `convert --salvage` of sources of which parts cannot be read: the rest has to arrive.
@Suite(.enabled(if: Qemu.isInstalled && NBDTestServer.isInstalled, "needs nbdkit and qemu-nbd"))
struct SalvageTests {
    private let folder: TempFolder
    private static let size = 8 << 20

    init() throws { folder = try TempFolder() }

    /// Serves a file, of which these ranges in bytes cannot be read.
    private func serve(_ file: String, without ranges: [Range<Int>]) throws -> NBDTestServer {
        var map = "0x0 + 1\n"
        var position = 0
        for range in ranges {
            if position < range.lowerBound {
                map += "0x\(hex(position)) 0x\(hex(range.lowerBound - position)) +\n"
            }
            map += "0x\(hex(range.lowerBound)) 0x\(hex(range.count)) -\n"
            position = range.upperBound
        }
        map += "0x\(hex(position)) 0x\(hex(1 << 40)) +\n"
        let path = try folder.write("map", Array(map.utf8))
        return try NBDTestServer.nbdkit(
            "--filter=ddrescue", "file", file, "ddrescue-mapfile=\(path)")
    }

    private func hex(_ number: Int) -> String { String(number, radix: 16) }

    private func disk() throws -> [UInt8] {
        try writeNoise(folder.path("disk"), count: Self.size)
        return try Array(contents(folder.path("disk")))
    }

    private static let bad = [
        0..<512, 1 << 20..<(1 << 20) + 4096, 3_000_320..<3_000_832, 5 << 20..<6 << 20,
        size - 512..<size,
    ]

    /// Exactly the sectors that cannot be read are zeros, and qemu-img makes the same disk of them.
    @Test(arguments: ["", "-m 1", "-W -m 16", "-S 0", "-O qcow2", "-c -O qcow2", "-n"])
    func onlyWhatCannotBeReadIsLost(_ options: String) throws {
        var expected = try disk()
        for range in Self.bad {
            expected.replaceSubrange(range, with: repeatElement(0, count: range.count))
        }
        let server = try serve(folder.path("disk"), without: Self.bad)
        let target = folder.path("target")
        if options == "-n" { try writeFilled(target, byte: 7, count: Self.size) }
        let outcome = try Swimg.convert(
            options.words + ["--salvage", "-f", "raw", server.uri, target])
        #expect(outcome.isSuccess && outcome.output.isEmpty, "\(outcome)")
        let lines = outcome.errorText.split(separator: "\n")
        #expect(lines.count == Self.bad.count, "\(outcome)")
        for (line, range) in zip(lines, Self.bad) {
            #expect(
                line == "swimg: warning: \(server.uri): \(range.count) bytes from guest offset "
                    + "\(range.lowerBound) on cannot be read, and become zeros: Input/output error")
        }
        let raw = try folder.write("expected", expected)
        let format = options.contains("qcow2") ? "qcow2" : "raw"
        #expect(try Qemu.difference(raw, "raw", target, format) == nil)
        guard options.isEmpty else { return }
        try Qemu.img("convert", "--salvage", "-q", "-f", "raw", server.uri, folder.path("theirs"))
        #expect(try Qemu.difference(folder.path("theirs"), "raw", target, "raw") == nil)
    }

    /// Called as qemu-img, the program prints qemu-img's lines.
    @Test func hasTheWordsOfQemuImg() throws {
        _ = try disk()
        let server = try serve(folder.path("disk"), without: Self.bad)
        let link = folder.path("qemu-img")
        try FileManager.default.createSymbolicLink(atPath: link, withDestinationPath: Swimg.path)
        let line = ["convert", "--salvage", "-m", "1", "-f", "raw", server.uri]
        let own = try run(link, line + [folder.path("own")])
        let theirs = try run("qemu-img", line + [folder.path("theirs")])
        #expect(own.isSuccess && own.errorText == theirs.errorText, "\(own)\n\(theirs)")
        let quiet = try run(link, ["convert", "-q"] + line.dropFirst() + [folder.path("own")])
        #expect(quiet.isSuccess && quiet.errors.isEmpty, "\(quiet)")
    }

    /// Without the option it stays an error, and there is no target.
    @Test func anErrorStaysOne() throws {
        _ = try disk()
        let server = try serve(folder.path("disk"), without: [0..<512])
        let outcome = try Swimg.convert("-f", "raw", server.uri, folder.path("target"))
        #expect(outcome.status == 1 && !folder.names.contains("target"), "\(outcome)")
    }

    /// The digest is that of what was written.
    @Test func theDigestIsThatOfTheTarget() throws {
        _ = try disk()
        let server = try serve(folder.path("disk"), without: Self.bad)
        let target = folder.path("target")
        let outcome = try Swimg.convert(
            "--salvage", "-q", "--digest", "--algorithm", "sha256", "-f", "raw", server.uri, target)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(outcome.outputText == "sha256:\(try sha256(target))  \(target)\n")
    }

    /// Compressed clusters that cannot be read, or decompressed, are lost as a whole.
    @Test(arguments: [true, false])
    func compressedClusters(_ isUnreadable: Bool) throws {
        let bytes = try disk()
        let half = (0..<bytes.count).map { $0 & 2048 == 0 ? bytes[$0] : UInt8(3) }
        let disk = try folder.write("half", half)
        let image = folder.path("image")
        try Qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", disk, image)
        let patcher = try Qcow2Patcher(image)
        var expected = half
        var places: [Range<Int>] = []
        for cluster in [0, 7, 8, 127] {
            let entry = try patcher.word(patcher.l2Entry(cluster))
            let host = Int(entry & (1 << 54 - 1))
            // The middle of the stream, which shares no sector with its neighbours.
            let sector = host / 512 * 512 + 4096
            places.append(sector..<sector + 512)
            // A block of a kind that deflate does not have.
            if !isUnreadable { try patcher.write([0xff], at: host) }
            let range = cluster * 65536..<(cluster + 1) * 65536
            expected.replaceSubrange(range, with: repeatElement(0, count: range.count))
        }
        let server = isUnreadable ? try serve(image, without: places) : nil
        let target = folder.path("target")
        let outcome = try Swimg.convert(
            "--salvage", "-f", "qcow2", server?.uri ?? image, target)
        #expect(outcome.isSuccess, "\(outcome)")
        let lines = outcome.errorText.split(separator: "\n")
        #expect(lines.count == (isUnreadable ? 3 : 4), "\(outcome)")
        #expect(lines.allSatisfy { $0.contains("become zeros") }, "\(outcome)")
        #expect(lines[0].contains(": 65536 bytes from guest offset 0 on"), "\(outcome)")
        #expect(try mismatch(contents(target), Data(expected)) == nil)
    }

    /// The entries of a table that cannot be read map what is lost; a table that leads nowhere is
    /// lost in part only.
    @Test func tables() throws {
        var expected = try disk()
        let image = folder.path("image")
        try Qemu.img(
            "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", folder.path("disk"),
            image)
        let patcher = try Qcow2Patcher(image)
        // A table maps 2 MiB here. The second cannot be read, and an entry of the last is damaged.
        func table(_ index: Int) throws -> Int {
            Int(try patcher.word(patcher.l1 + 8 * index) & (1 << 56 - 1))
        }
        let lost = try table(1)
        try patcher.change(table(3) + 5 * 8) { $0 | 0x3e }
        for range in [2 << 20..<4 << 20, (6 << 20) + 5 * 4096..<(6 << 20) + 6 * 4096] {
            expected.replaceSubrange(range, with: repeatElement(0, count: range.count))
        }
        let server = try serve(image, without: [lost..<lost + 512])
        let target = folder.path("target")
        let outcome = try Swimg.convert("--salvage", "-f", "qcow2", server.uri, target)
        #expect(outcome.isSuccess, "\(outcome)")
        let lines = outcome.errorText.split(separator: "\n")
        #expect(lines.count == 2 && lines[0].contains("2097152 bytes from guest offset 2097152"))
        #expect(lines.last?.contains("4096 bytes from guest offset \((6 << 20) + 20480)") ?? false)
        #expect(try mismatch(contents(target), Data(expected)) == nil)
    }

    /// Sectors of an overlay that cannot be read become zeros: those of the backing file, which they
    /// replaced, do not come back.
    @Test func chains() throws {
        var expected = try disk()
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "disk", "-F", "raw", "top", in: folder.path)
        try Qemu.io("qcow2", folder.path("top"), ["write -P 9 1M 128k"])
        expected.replaceSubrange(
            1 << 20..<(1 << 20) + 131072, with: repeatElement(9, count: 131072))
        let host = try #require(
            try Qemu.map(folder.path("top"), "qcow2").first { $0.depth == 0 }?.offset)
        let bad = Int(host) + 1024..<Int(host) + 2048
        let server = try serve(folder.path("top"), without: [bad])
        expected.replaceSubrange(
            (1 << 20) + 1024..<(1 << 20) + 2048, with: repeatElement(0, count: 1024))
        let raw = try folder.write("expected", expected)
        for options in [[], ["-O", "qcow2", "-B", folder.path("disk"), "-F", "raw"]] {
            let target = folder.path("target\(options.count)")
            let name =
                #"json:{"driver":"qcow2","backing":{"driver":"raw","file.filename":"DISK"},"#
                + #""file":{"driver":"nbd","path":"SOCKET"}}"#
            let source = name.replacing("DISK", with: folder.path("disk"))
                .replacing("SOCKET", with: server.socket)
            let outcome = try Swimg.convert(["--salvage"] + options + [source, target])
            #expect(outcome.isSuccess, "\(outcome)")
            #expect(
                outcome.errorText.contains("1024 bytes from guest offset 1049600"), "\(outcome)")
            let format = options.isEmpty ? "raw" : "qcow2"
            #expect(try Qemu.difference(raw, "raw", target, format) == nil)
        }
    }

    /// A server that cannot tell what is a hole: all is read, and nothing is lost.
    @Test func blockStatus() throws {
        _ = try disk()
        let server = try NBDTestServer.nbdkit(
            "eval", "get_size=echo \(Self.size)", "can_extents=exit 0",
            "extents=echo EIO >&2; exit 1",
            "pread=dd if=\(folder.path("disk")) bs=64k skip=$4 count=$3 "
                + "iflag=skip_bytes,count_bytes 2>/dev/null"
        )
        let target = folder.path("target")
        let outcome = try Swimg.convert("--salvage", "-f", "raw", server.uri, target)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try Qemu.difference(folder.path("disk"), "raw", target, "raw") == nil)
        #expect(try Swimg.convert("-f", "raw", server.uri, target).status == 1)
    }

    /// A server that goes away takes all that follows with it: that is an error.
    @Test func aLostServerIsAnError() throws {
        _ = try disk()
        let server = try NBDTestServer.nbdkit(
            "--filter=delay", "file", folder.path("disk"), "rdelay=300ms")
        let running = try Swimg.start(
            ["--salvage", "-m", "1", "-f", "raw", server.uri, folder.path("target")])
        usleep(700_000)
        server.stop()
        let outcome = try running.wait()
        #expect(outcome.status == 1 && !folder.names.contains("target"), "\(outcome)")
    }

    /// Reading ahead fails with one byte, too; the rest arrives nevertheless.
    @Test(.enabled(if: OddServer.isInstalled, "needs Python"), arguments: ["raw", "qcow2"])
    func http(_ format: String) throws {
        var expected = try disk()
        let image = folder.path("image")
        // Clusters that are compressed one by one are read in blocks.
        let half = (0..<expected.count).map { $0 & 2048 == 0 ? expected[$0] : UInt8(3) }
        if format == "qcow2" { expected = half }
        let source = try folder.write("source", expected)
        try Qemu.img(
            "convert", format == "raw" ? "-q" : "-c", "-f", "raw", "-O", format, source, image)
        let isRaw = format == "raw"
        let host =
            isRaw
            ? 5_000_000
            : try Int(Qcow2Patcher(image).word(Qcow2Patcher(image).l2Entry(80)) & (1 << 54 - 1))
                + 9000
        let lost =
            isRaw ? 5_000_000 / 512 * 512..<5_000_000 / 512 * 512 + 512 : 80 * 65536..<81 * 65536
        expected.replaceSubrange(lost, with: repeatElement(0, count: lost.count))
        let server = try OddServer(image, "unreadable=\(host)")
        let target = folder.path("target")
        let outcome = try Swimg.convert(
            "--salvage", "--retries", "0", "-f", format, server.url, target)
        #expect(outcome.isSuccess, "\(outcome)")
        #expect(
            outcome.errorText.contains("\(lost.count) bytes from guest offset \(lost.lowerBound)"))
        #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
        #expect(try mismatch(contents(target), Data(expected)) == nil)
    }

    @Test(arguments: [
        ("-C --salvage disk target", "Cannot use copy offloading in salvaging mode"),
        ("--salvage disk.gz target", "read in one pass"),
        ("--salvage --source-digest \(String(repeating: "0", count: 64)) disk target", "--salvage"),
        ("--salvage nosuch target", "No such file"),
        ("--salvage -f qcow2 damaged target", "L1 table"),
    ])
    func refuses(_ line: String, _ words: String) throws {
        _ = try disk()
        try require("gzip", ["-k", folder.path("disk")])
        try Qemu.img("create", "-q", "-f", "qcow2", folder.path("damaged"), "1G")
        try Qcow2Patcher(folder.path("damaged")).setWord(40, 1 << 40)
        let outcome = try Swimg.convert(line.words, in: folder.path)
        #expect(outcome.status == 1 && outcome.errorText.contains(words), "\(outcome)")
        #expect(!folder.names.contains("target"))
    }
}
