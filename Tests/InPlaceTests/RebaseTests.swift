import Foundation
import TestSupport
import Testing

/// swimg and qemu-img rebase copies of the same images.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct RebaseTests {
    /// Random chains. The new backing file is none, a lower image of the chain, or the top of
    /// another chain.
    @Test(arguments: some(8, of: Array(0..<40)))
    func theDiskStays(_ number: Int) throws {
        let folder = try TempFolder()
        var other = RandomImage(seed: UInt64(41_000 + number), folder: folder)
        try other.build(depths: [1, 2])
        var names: [(String, String)] = []
        for name in folder.names.reversed() {
            let path = folder.path("other\(name)")
            try FileManager.default.moveItem(atPath: folder.path(name), toPath: path)
            if name != other.top {
                try Qemu.img(
                    "rebase", "-u", "-b", "other\(name)", "-F",
                    isQcow2(path) ? "qcow2" : "raw", folder.path("other\(other.top)"))
            }
        }
        names.append(("other\(other.top)", other.format))
        var maker = RandomImage(seed: UInt64(42_000 + number), folder: folder)
        try maker.build(depths: [1, 2, 3, 3])
        guard maker.format == "qcow2" else { return }
        if maker.top != "layer0" {
            names.append(("layer0", isQcow2(folder.path("layer0")) ? "qcow2" : "raw"))
        }
        var random = SplitMix64(seed: UInt64(number))
        let (backing, format) = random.pick(names + [("", "raw")])
        let before = folder.path("before")
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", folder.path(maker.top), before)
        let words =
            ["rebase", "-f", "qcow2", "-b", backing, "-F", format]
            + (random.once(in: 4) ? ["-t", "none", "-T", "none"] : []) + [maker.top]
        let twins = try Twins(copying: folder)
        let story = other.story + "\n" + maker.story + "\nswimg \(words)"
        let theirs = try run("qemu-img", words, in: twins.theirs.path)
        let ours = try run(Swimg.path, words, in: folder.path)
        #expect(ours.status == theirs.status && ours.errors.isEmpty, "\(story)\n\(ours)\n\(theirs)")
        let top = folder.path(maker.top)
        #expect(try Qemu.difference(top, "qcow2", before, "raw") == nil, "\(story)\n\(ours)")
        #expect(try Qemu.damage(top) == nil, "\(story)\n\(ours)")
        let (own, their) = try (facts(top), facts(twins.theirs.path(maker.top)))
        #expect(own == their, "\(story)\n\(ours)")
    }

    private func isQcow2(_ path: String) -> Bool {
        (try? contents(path, at: 0, count: 4)) == [0x51, 0x46, 0x49, 0xfb]
    }

    private func facts(_ path: String) throws -> NSDictionary {
        let all = try #require(info(path, "qcow2").mutableCopy() as? NSMutableDictionary)
        all.removeObject(forKey: "full-backing-filename")
        return all
    }

    /// A raw file of 1 MiB, `mid` of 2 MiB over it and `top` of 3 MiB over that.
    private func makeChain(_ options: String = "compat=1.1") throws -> TempFolder {
        let folder = try TempFolder()
        try writeFilled(folder.path("base"), byte: 1, count: 1 << 20)
        for (name, below, size) in [("mid", "base", "2M"), ("top", "mid", "3M")] {
            try Qemu.img(
                "create", "-q", "-f", "qcow2", "-o", options, "-b", below, "-F",
                below == "base" ? "raw" : "qcow2", name, size, in: folder.path)
        }
        try Qemu.io(
            "qcow2", folder.path("mid"), ["write -P 2 64k 64k", "write -P 3 1536k 64k"])
        try Qemu.io("qcow2", folder.path("top"), ["write -P 4 256k 64k", "write -P 5 2560k 64k"])
        return folder
    }

    /// Only what differs is copied: what both chains take from one file is not even read.
    @Test func whatIsTheSameStaysBelow() throws {
        let folder = try makeChain()
        let twins = try Twins(copying: folder)
        try twins.run(["rebase", "-b", "base", "-F", "raw", "top"])
        let (own, their) = try (
            Qemu.map(folder.path("top"), "qcow2"), Qemu.map(twins.theirs.path("top"), "qcow2")
        )
        let mine = own.map { [$0.start, $0.length, Int64($0.depth), $0.data ? 1 : 0] }
        #expect(mine == their.map { [$0.start, $0.length, Int64($0.depth), $0.data ? 1 : 0] })
        #expect(own.contains { $0.start == 0 && $0.depth == 1 })
    }

    /// Where the new backing file holds the same bytes elsewhere, nothing is copied.
    @Test func equalBytesAreNotCopied() throws {
        let folder = try makeChain()
        try Qemu.img(
            "convert", "-O", "qcow2", "-o", "cluster_size=4k", "mid", "other", in: folder.path)
        try Qemu.io("qcow2", folder.path("other"), ["write -P 6 700k 1k"])
        let twins = try Twins(copying: folder)
        try twins.run(["rebase", "-b", "other", "-F", "qcow2", "top"])
        try twins.expectSame("top", "qcow2", "")
        let copied = try Qemu.map(folder.path("top"), "qcow2").filter { $0.depth == 0 && $0.data }
        #expect(copied.map(\.start) == [256 << 10, 640 << 10, 2560 << 10])
        #expect(copied.allSatisfy { $0.length == 64 << 10 })
    }

    /// Old images name qemu's drivers for files as the format of their raw backing files.
    @Test(arguments: ["file", "host_device"])
    func driversOfFilesAsFormats(_ format: String) throws {
        let folder = try TempFolder()
        try writeFilled(folder.path("base"), byte: 1, count: 1 << 20)
        try Qemu.img("create", "-q", "-f", "qcow2", "top", "1M", in: folder.path)
        let twins = try Twins(copying: folder)
        try twins.run(["rebase", "-u", "-b", "base", "-F", format, "top"])
        #expect(try contents(folder.path("top")) == contents(twins.theirs.path("top")))
        let outcome = try run(
            Swimg.path, ["convert", "-O", "raw", "top", "whole"], in: folder.path)
        #expect(outcome.isSuccess, "\(outcome)")
        #expect(try contents(folder.path("whole")) == contents(folder.path("base")))
    }

    /// qemu-img 7.2 loses the zeros of a version 2 image that gets its first backing file.
    @Test(arguments: ["compat=0.10", "compat=1.1"])
    func theFirstBackingFile(_ options: String) throws {
        let folder = try TempFolder()
        try writeFilled(folder.path("base"), byte: 1, count: 3 << 20)
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", options, "top", "2M", in: folder.path)
        try Qemu.io("qcow2", folder.path("top"), ["write -P 1 500k 500k"])
        let before = folder.path("before")
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", folder.path("top"), before)
        let outcome = try run(
            Swimg.path, ["rebase", "-b", "base", "-F", "raw", "top"], in: folder.path)
        #expect(outcome.isSuccess && outcome.output.isEmpty, "\(outcome)")
        #expect(try Qemu.difference(folder.path("top"), "qcow2", before, "raw") == nil)
        #expect(try Qemu.damage(folder.path("top")) == nil)
    }

    /// Copied clusters are compressed.
    @Test func compressed() throws {
        let folder = try makeChain()
        let before = folder.path("before")
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", folder.path("top"), before)
        let outcome = try run(Swimg.path, ["rebase", "-c", "-b", "", "top"], in: folder.path)
        #expect(outcome.isSuccess, "\(outcome)")
        #expect(try Qemu.difference(folder.path("top"), "qcow2", before, "raw") == nil)
        let check = try Qemu.img("check", "--output=json", folder.path("top"))
        #expect(check.contains("\"compressed-clusters\": 16"), "\(check)")
    }

    @Test(arguments: [
        "-b base -F raw top", "-q -b base -F raw top", "-b base top", "-u -b base top",
        "-u -b nosuch -F raw top", "-b nosuch -F raw top", "-b nosuch top", "-b base -F foo top",
        "-u -b base -F foo top", "top", "-F raw top", "-u top", "-u -F raw top",
        "-f raw -b mid base",
        "-f raw -b mid -F qcow2 base", "-u -f raw -b mid base", "-b mid base",
        "-t foo -b base -F raw top", "-T foo -b base -F raw top", "-f foo -b base -F raw top",
        "-b base -F raw nosuch", "-U -u -b base -F raw top", "-U -b base -F raw top",
        "-b base -F raw top mid", "-b ./base -F raw top", "-b top -F qcow2 top",
        "-b top -F qcow2 mid", "-u -b top -F qcow2 mid", "-b sub/link -F raw top",
        "-b ../base -F raw sub/top", "-b base -F raw sub/top",
    ])
    func textAndStatus(_ line: String) throws {
        let folder = try makeChain()
        let sub = try folder.makeFolder("sub")
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "../mid", "-F", "qcow2", "\(sub)/top",
            in: folder.path)
        let twins = try Twins(copying: folder)
        let theirs = try run("qemu-img", ["rebase"] + line.words, in: twins.theirs.path)
        let ours = try run(Swimg.path, ["rebase"] + line.words, in: folder.path)
        #expect(ours.status == theirs.status, "\(ours)\n\(theirs)")
        #expect(ours.outputText == theirs.outputText, "\(ours)\n\(theirs)")
        let (own, their) = (withoutName(ours), withoutName(theirs))
        // The message of a file that cannot be opened has swimg's form, and locks name the file
        // elsewhere.
        let isOpening = line.contains("nosuch") || line.contains("-b top") || line.contains("sub/")
        #expect(
            own.isEmpty == their.isEmpty
                && (isOpening || own.hasPrefix(their.prefix { $0 != "\n" })),
            "\(ours)\n\(theirs)")
        for name in ["top", "mid"] {
            #expect(
                try facts(folder.path(name)) == facts(twins.theirs.path(name)),
                "\(ours)\n\(theirs)")
        }
    }

    /// Names that the header has no room for are refused before anything is copied.
    @Test(arguments: ["512", "64k"], [100, 376, 377, 400, 1023, 1024])
    func longNames(_ cluster: String, _ length: Int) throws {
        let folder = try makeChain("cluster_size=\(cluster)")
        let twins = try Twins(copying: folder)
        let name = String(repeating: "x", count: length)
        let words = ["rebase", "-u", "-b", name, "-F", "raw", "top"]
        let theirs = try run("qemu-img", words, in: twins.theirs.path)
        let ours = try run(Swimg.path, words, in: folder.path)
        #expect(ours.status == theirs.status, "\(ours)\n\(theirs)")
        #expect(withoutName(ours) == withoutName(theirs))
        #expect(try facts(folder.path("top")) == facts(twins.theirs.path("top")))
        #expect(try Qemu.img("check", "-U", "-f", "qcow2", folder.path("mid")).isEmpty == false)
    }

    /// A rebase that fails or is killed at any write leaves the disk on the old backing file or
    /// on the new one.
    @Test(
        .enabled(if: canTraceSystemCalls, "strace ends it at a certain write"),
        arguments: ["-b base -F raw", "-b  "])
    func killedAnywhere(_ way: String) throws {
        let folder = try makeChain("cluster_size=4k")
        try Qemu.img("snapshot", "-c", "s", folder.path("top"))
        let wanted = folder.path("wanted")
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", folder.path("top"), wanted)
        let target = way.contains("base") ? ["-b", "base", "-F", "raw"] : ["-b", ""]
        try disturb(["rebase"] + target + ["top"], in: folder, at: 1...14) { copy, outcome in
            #expect(try Qemu.errors(copy.path("top")) == nil, "\(outcome)")
            let difference = try Qemu.difference(copy.path("top"), "qcow2", wanted, "raw")
            #expect(difference == nil, "\(outcome)")
        }
    }
}
