import Foundation
import TestSupport
import Testing

/// swimg and qemu-img commit copies of the same chains.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct CommitTests {
    /// Random chains of two and three images, whose sizes, versions and clusters differ.
    @Test(arguments: some(8, of: Array(0..<40)))
    func commitsLikeQemu(_ number: Int) throws {
        let folder = try TempFolder()
        var maker = RandomImage(seed: UInt64(31_000 + number), folder: folder)
        try maker.build(depths: [2, 3, 3])
        var random = SplitMix64(seed: UInt64(number))
        let top = try #require(Int(maker.top.dropFirst("layer".count)))
        let below = "layer\(random.below(top))"
        let options = random.pick([[], [], ["-d"], ["-b", below], ["-b", "./\(below)", "-d"]])
        let twins = try Twins(copying: folder)
        let words = ["commit"] + options + ["-f", "qcow2", maker.top]
        let story = maker.story + "\nswimg \(words.joined(separator: " "))"
        try twins.run(words, story)
        for layer in 0...top {
            let name = "layer\(layer)"
            let isRaw = layer == 0 && !isQcow2(folder.path(name))
            try twins.expectSame(name, isRaw ? "raw" : "qcow2", story)
        }
        let (own, other) = try (entries(folder, maker.top), entries(twins.theirs, maker.top))
        #expect(own == other, "clusters of the overlay\n\(story)")
    }

    private func isQcow2(_ path: String) -> Bool {
        (try? contents(path, at: 0, count: 4)) == [0x51, 0x46, 0x49, 0xfb]
    }

    /// Number of stretches that the overlay itself holds.
    private func entries(_ folder: TempFolder, _ name: String) throws -> Int {
        try Qemu.map(folder.path(name), "qcow2").count { $0.depth == 0 }
    }

    /// A base that shows its own backing file, or old clusters, behind its old end.
    @Test(arguments: ["compat=1.1", "compat=1.1,cluster_size=4k", "extended_l2=on"])
    func theBaseGrows(_ options: String) throws {
        let folder = try TempFolder()
        try writeFilled(folder.path("lowest"), byte: 9, count: 5 << 20)
        for (name, below, size) in [("base", "lowest", "1000448"), ("top", "base", "4M")] {
            try Qemu.img(
                "create", "-q", "-f", "qcow2", "-o", options, "-b", below, "-F",
                below == "lowest" ? "raw" : "qcow2", name, size, in: folder.path)
        }
        try Qemu.io("qcow2", folder.path("base"), ["write -P 1 900k 77k"])
        try Qemu.io("qcow2", folder.path("top"), ["write -P 2 3M 100k", "write -z 10k 1k"])
        let twins = try Twins(copying: folder)
        try twins.run(["commit", "-f", "qcow2", "top"])
        for name in ["base", "top"] { try twins.expectSame(name, "qcow2", options) }
    }

    /// The tables of a base move when it grows, and bitmaps take their old places. Parts of its
    /// clusters are read, because those of the overlay are smaller.
    @Test(arguments: ["cluster_size=64k", "cluster_size=2M"], [false, true])
    func theTablesOfTheBaseMove(_ options: String, hasBitmap: Bool) throws {
        let folder = try TempFolder()
        try writeFilled(folder.path("lowest"), byte: 9, count: 5 << 20)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", options, "-b", "lowest", "-F", "raw", "base",
            "1000448", in: folder.path)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base", "-F", "qcow2",
            "top", "4M", in: folder.path)
        try Qemu.io("qcow2", folder.path("base"), ["write -P 1 0 200k"])
        if hasBitmap {
            try Qemu.img("bitmap", "--add", "-g", "4k", "base", "b", in: folder.path)
        }
        try Qemu.io(
            "qcow2", folder.path("top"), ["write -P 2 16k 4k", "write -P 2 84k 4k", "write 3M 5k"])
        let twins = try Twins(copying: folder)
        try twins.run(["commit", "-f", "qcow2", "top"])
        for name in ["base", "top"] { try twins.expectSame(name, "qcow2", options) }
        guard hasBitmap else { return }
        let own = try Qemu.bitmap("b", of: folder.path("base"))
        for place in [16 << 10, 84 << 10, 3 << 20] {
            #expect(own.contains { $0.contains(Int64(place)) }, "\(own)")
        }
    }

    /// The overlay ends in the middle of a cluster of its larger base, which keeps the rest.
    @Test(arguments: ["512", "64k", "2M"])
    func theRestOfTheBaseStays(_ cluster: String) throws {
        let folder = try TempFolder()
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=\(cluster)", "base", "6M",
            in: folder.path)
        try Qemu.io("qcow2", folder.path("base"), ["write -P 1 0 6M"])
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", "1000448",
            in: folder.path)
        try Qemu.io("qcow2", folder.path("top"), ["write -P 2 996352 4k"])
        let twins = try Twins(copying: folder)
        try twins.run(["commit", "top"])
        try twins.expectSame("base", "qcow2", cluster)
    }

    /// Bases that snapshots share: what the snapshots hold stays.
    @Test func snapshotsKeepTheirContent() throws {
        let folder = try TempFolder()
        try Qemu.img("create", "-q", "-f", "qcow2", "base", "3M", in: folder.path)
        try Qemu.io("qcow2", folder.path("base"), ["write -P 1 0 3M"])
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", in: folder.path)
        try Qemu.io("qcow2", folder.path("top"), ["write -P 2 1M 1M"])
        for name in ["base", "top"] { try Qemu.img("snapshot", "-c", "s", folder.path(name)) }
        try Qemu.io("qcow2", folder.path("top"), ["write -P 3 1500k 1M", "write -z 2500k 70k"])
        let twins = try Twins(copying: folder)
        try twins.run(["commit", "top"])
        for name in ["base", "top"] {
            try twins.expectSame(name, "qcow2", "")
            for folder in [twins.own, twins.theirs] {
                try Qemu.img("snapshot", "-a", "s", folder.path(name))
            }
            try twins.expectSame(name, "qcow2", "snapshot")
        }
    }

    @Test(arguments: [
        "top", "-q top", "-p top", "-p -q top", "-d top", "-t none top", "-t foo top",
        "-f foo top", "-f qcow2 nosuch", "-b nosuch top", "-b top top", "-b mid top",
        "-b base top", "-b ./base -d top", "base", "-f raw base", "top mid", "-r foo top",
        "-r 100M top", "--image-opts driver=qcow2,file.filename=top", "--image-opts -f qcow2 top",
        "json:{\"file.filename\":\"top\"}",
    ])
    func textAndStatus(_ line: String) throws {
        let folder = try makeChain()
        let twins = try Twins(copying: folder)
        // Progress is shown more often by qemu-img.
        if line.contains("-p") {
            let outcome = try run(Swimg.path, ["commit"] + line.words, in: folder.path)
            let expected = line.contains("-q") ? "" : "(100.00/100%)\r\nImage committed.\n"
            #expect(outcome.isSuccess && outcome.outputText.hasSuffix(expected), "\(outcome)")
        } else {
            let other = try run("qemu-img", ["commit"] + line.words, in: twins.theirs.path)
            let outcome = try run(Swimg.path, ["commit"] + line.words, in: folder.path)
            #expect(outcome.status == other.status, "\(outcome)\n\(other)")
            #expect(outcome.outputText == other.outputText, "\(outcome)\n\(other)")
            let (own, their) = (withoutName(outcome), withoutName(other))
            #expect(
                own.hasPrefix(their.prefix { $0 != "\n" }) || line.contains("nosuch"),
                "\(outcome)\n\(other)")
            for name in ["mid", "top"] { try twins.expectSame(name, "qcow2", line) }
        }
    }

    private func makeChain() throws -> TempFolder {
        let folder = try TempFolder()
        try writeFilled(folder.path("base"), byte: 1, count: 1 << 20)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "mid", "2M",
            in: folder.path)
        try Qemu.io(
            "qcow2", folder.path("mid"),
            ["write -P 2 64k 64k", "write -z 128k 64k", "write -P 3 1536k 64k"])
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top", "3M",
            in: folder.path)
        try Qemu.io("qcow2", folder.path("top"), ["write -P 4 256k 64k", "write -P 5 2560k 64k"])
        return folder
    }

    /// The rate limits the time from below: 4 MiB at 2 MiB a second, of which the last chunk, 2 MiB
    /// at most, ends at once.
    @Test func theRateIsKept() throws {
        let folder = try TempFolder()
        try Qemu.img("create", "-q", "-f", "raw", "base", "4M", in: folder.path)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", in: folder.path)
        try Qemu.io("qcow2", folder.path("top"), ["write -P 1 0 4M"])
        let start = ContinuousClock.now
        let outcome = try run(Swimg.path, ["commit", "-r", "2M", "top"], in: folder.path)
        #expect(outcome.isSuccess && ContinuousClock.now - start > .seconds(1), "\(outcome)")
        #expect(try contents(folder.path("base")).allSatisfy { $0 == 1 })
    }

    /// A commit that fails or is killed at any write leaves valid images: the overlay shows its
    /// disk, and the base the old or the new bytes of each cluster.
    @Test(.enabled(if: canTraceSystemCalls, "strace ends it at a certain write"))
    func killedAnywhere() throws {
        let folder = try TempFolder()
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "base", "2M",
            in: folder.path)
        try Qemu.io("qcow2", folder.path("base"), ["write -P 1 0 1M"])
        try Qemu.img("snapshot", "-c", "s", folder.path("base"))
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base", "-F", "qcow2",
            "top", "3M", in: folder.path)
        try Qemu.io("qcow2", folder.path("top"), ["write -P 2 500k 1M", "write -P 3 2500k 100k"])
        let wanted = folder.path("wanted")
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", folder.path("top"), wanted)
        try disturb(["commit", "top"], in: folder, at: 1...14) { copy, outcome in
            for name in ["base", "top"] {
                #expect(try Qemu.errors(copy.path(name)) == nil, "\(outcome)")
            }
            let difference = try Qemu.difference(copy.path("top"), "qcow2", wanted, "raw")
            #expect(difference == nil, "\(outcome)")
        }
    }
}
