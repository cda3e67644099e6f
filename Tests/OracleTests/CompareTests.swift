import Foundation
import TestSupport
import Testing

/// `compare` prints qemu-img's text and exits with its status.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct CompareTests {
    private func expectSame(
        _ arguments: [String], in folder: String? = nil,
        at location: SourceLocation = #_sourceLocation
    ) throws {
        let theirs = try run("qemu-img", ["compare"] + arguments, in: folder)
        let own = try run(Swimg.path, ["compare"] + arguments, in: folder)
        #expect(own.status == theirs.status, "\(own)\n\(theirs)", sourceLocation: location)
        // In strict mode, qemu's block status also depends on where ranges end, so qemu-img may
        // report a mismatch that only comes from how ranges are cut. The verdict is equal but
        // the offset differs.
        let isCut = arguments.contains("-s") && theirs.outputText.contains("block status mismatch")
        #expect(
            isCut
                ? !own.outputText.contains("identical") : own.outputText == theirs.outputText,
            "\(own)\n\(theirs)", sourceLocation: location)
        #expect(own.errors.isEmpty == theirs.errors.isEmpty, "\(own)", sourceLocation: location)
    }

    /// Compares each image with the next one and with the raw disk. In strict mode nearly all pairs
    /// differ.
    @Test(arguments: some(12, of: SourceGallery.names))
    func gallery(_ name: String) throws {
        let names = SourceGallery.names
        let index = try #require(names.firstIndex(of: name))
        let image = try SourceGallery.named(name)
        let next = try SourceGallery.named(names[(index + 1) % names.count])
        for other in [image, next, try SourceGallery.named("raw-sparse")] {
            for options in [[], ["-q"], ["-U", "-T", "none"]] {
                try expectSame(
                    options + ["-f", image.format, "-F", other.format, image.path, other.path])
            }
        }
        try expectSame(["-s", "-f", image.format, "-F", image.format, image.path, image.path])
    }

    /// After a change of one byte, its sector is reported whichever worker finds a difference
    /// first.
    @Test(arguments: [0, 511, 512, 70_001, 131_071, 131_072, 5 << 20, (9 << 20) - 1])
    func oneByte(_ offset: Int) throws {
        let folder = try TempFolder()
        let bytes = noise(4, 9 << 20)
        let one = try folder.write("one.raw", bytes)
        var changed = bytes
        changed[offset] ^= 1
        // A second difference at the end must not be reported.
        changed[changed.count - 1] ^= 2
        let other = try folder.write("other.raw", changed)
        try expectSame(["-f", "raw", "-F", "raw", one, other])
        for options in ["compat=1.1", "cluster_size=512", "compression_type=zstd"] {
            let image = folder.path("image.qcow2")
            let flag = options.hasPrefix("compression") ? "-c" : "-q"
            try Qemu.img("convert", flag, "-O", "qcow2", "-o", options, other, image)
            try expectSame(["-f", "raw", "-F", "qcow2", one, image])
            try expectSame(["-f", "qcow2", "-F", "raw", image, one])
        }
        // Comparisons with zeros, which are not read.
        let hole = folder.path("hole.raw")
        try Qemu.img("create", "-q", hole, "9M")
        var lone = [UInt8](repeating: 0, count: 9 << 20)
        lone[offset] = 1
        let island = try folder.write("island.raw", lone)
        try expectSame(["-f", "raw", "-F", "raw", hole, island])
        try expectSame(["-f", "raw", "-F", "raw", island, hole])
    }

    @Test(arguments: [0, 1, 511, 512, 513, 65_537, 1_000_000])
    func sizes(_ size: Int) throws {
        let folder = try TempFolder()
        let bytes = noise(5, 1_000_000)
        let short = try folder.write("short.raw", Array(bytes.prefix(size)))
        let padded = try folder.write(
            "padded.raw", bytes.prefix(size) + [UInt8](repeating: 0, count: 3_000_000 - size))
        let long = try folder.write("long.raw", bytes + [1])
        for (one, other) in [(short, padded), (padded, short), (short, long), (long, short)] {
            for options in [[], ["-s"], ["-q"]] {
                try expectSame(options + ["-f", "raw", "-F", "raw", one, other])
            }
        }
    }

    /// A difference before damage is the answer, though both are found in one table.
    @Test func aDifferenceBeforeDamage() throws {
        let folder = try TempFolder()
        let bytes = noise(6, 1 << 20)
        let raw = try folder.write("raw", bytes)
        let image = folder.path("image")
        try Qemu.img("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, image)
        var changed = bytes
        changed[5000] ^= 1
        let other = try folder.write("other", changed)
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: image))
        func number(_ offset: UInt64) throws -> UInt64 {
            try file.seek(toOffset: offset)
            return try (file.read(upToCount: 8) ?? Data()).reduce(0) { $0 << 8 | UInt64($1) }
        }
        let mask: UInt64 = 0x00ff_ffff_ffff_fe00
        let entry = try number(number(40)) & mask + 3 * 8
        let first = try number(entry) >> 56
        try file.seek(toOffset: entry)
        file.write(Data([UInt8(first) | 0x10]))
        try file.close()
        try expectSame(["-f", "qcow2", "-F", "raw", image, other])
        let damaged = try run(Swimg.path, ["compare", "-f", "qcow2", "-F", "raw", image, raw])
        #expect(damaged.status > 1 && damaged.errorText.contains("bad L2 entry"), "\(damaged)")
    }

    /// A backing file that ends within the last sector cuts it in two.
    @Test func strictModeWithinTheLastSector() throws {
        let folder = try TempFolder()
        let bytes = noise(7, 1000)
        let short = try folder.write("short", bytes)
        let base = try folder.write("base", bytes + [UInt8](repeating: 0, count: 10))
        let top = folder.path("top")
        try Qemu.img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top, "1024")
        try expectSame(["-s", "-f", "raw", "-F", "qcow2", base, top])
        try expectSame(["-s", "-f", "qcow2", "-F", "raw", top, base])
        for pair in [[short, top], [top, short]] {
            let formats =
                pair[0] == top ? ["-f", "qcow2", "-F", "raw"] : ["-f", "raw", "-F", "qcow2"]
            let outcome = try run(Swimg.path, ["compare", "-s"] + formats + pair)
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        }
    }

    /// Strict mode compares allocation independently of the content.
    @Test func strictMode() throws {
        let folder = try TempFolder()
        func image(_ name: String, _ options: String, _ commands: [String] = []) throws {
            let options = options.isEmpty ? "compat=1.1" : options
            try Qemu.img(
                "create", "-q", "-f", "qcow2", "-o", options, name, "1M", in: folder.path)
            try Qemu.io("qcow2", folder.path(name), commands)
        }
        try image("empty", "")
        try image("zeros", "", ["write -z 0 1M"])
        try image("half", "", ["write -z 512k 512k"])
        try image("written", "", ["write -P 0 0 1M"])
        try image("compressed", "", ["write -c -P 0 0 64k", "write -P 0 64k 960k"])
        try image("metadata", "preallocation=metadata")
        try image("full", "preallocation=full")
        try image("overlay", "backing_file=half,backing_fmt=qcow2", ["write -z 0 64k"])
        try Qemu.img("create", "-q", folder.path("hole"), "1M")
        try Data(count: 1 << 20).write(to: URL(fileURLWithPath: folder.path("data")))
        let names = folder.names
        for one in names {
            for other in names {
                let formats = [one, other].map { ["data", "hole"].contains($0) ? "raw" : "qcow2" }
                try expectSame(
                    ["-s", "-f", formats[0], "-F", formats[1], one, other], in: folder.path)
            }
        }
    }

    @Test(arguments: [
        "", "one", "one two three", "-f nothing one one", "-T nothing one one", "missing one",
        "one missing", "-f qcow2 one one", "-x one one", "cut.qcow2 one", "bad.qcow2 bad.qcow2",
    ])
    func failures(_ line: String) throws {
        let folder = try TempFolder()
        _ = try folder.write("one", noise(6, 65536))
        // A truncated header and an image with a stream that cannot be decompressed.
        _ = try folder.write("cut.qcow2", [0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 3])
        let bad = try #require(Fixture.bad.first { $0.file == "bad-deflate-truncated.qcow2" })
        try FileManager.default.copyItem(atPath: bad.path(), toPath: folder.path("bad.qcow2"))
        try expectSame(line.words, in: folder.path)
    }

    @Test func progressEndsAsQemusDoes() throws {
        let image = try SourceGallery.named("v3-64k")
        let outcome = try run(
            Swimg.path, ["compare", "-p", "-f", "qcow2", "-F", "qcow2", image.path, image.path])
        #expect(outcome.isSuccess, "\(outcome)")
        #expect(outcome.outputText.hasPrefix("    (0.00/100%)\r"), "\(outcome)")
        let theirs = try require(
            "qemu-img", ["compare", "-p", "-f", "qcow2", "-F", "qcow2", image.path, image.path])
        let end = "    (100.00/100%)\rImages are identical.\n\n"
        #expect(outcome.outputText.hasSuffix(end) && theirs.hasSuffix(end), "\(outcome) \(theirs)")
    }

    /// Nearly empty 4 TiB disks: neither time nor memory may grow with the virtual size.
    @Test func hugeAndNearlyEmpty() throws {
        let folder = try TempFolder()
        for name in ["one", "other"] {
            try Qemu.img("create", "-q", "-f", "qcow2", folder.path(name), "4T")
            try Qemu.io("qcow2", folder.path(name), ["write -P 7 1T 64k"])
        }
        try expectSame(["one", "other"], in: folder.path)
        try Qemu.io("qcow2", folder.path("other"), ["write -P 8 3T 512"])
        try expectSame(["one", "other"], in: folder.path)
    }
}
