import Foundation
import TestSupport
import Testing

/// swimg and qemu-img amend copies of the same images.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct AmendTests {
    private enum Content: String, CaseIterable {
        case plain, backed, snapshots, backedSnapshots
    }

    static let ways = [
        "compat=0.10", "compat=0.10,lazy_refcounts=off", "refcount_bits=1", "refcount_bits=8",
        "refcount_bits=64", "refcount_bits=16", "lazy_refcounts=on", "size=5M", "size=1M",
        "size=5M,refcount_bits=32,lazy_refcounts=on", "compat=0.10,refcount_bits=16",
        "compat=v3,lazy_refcounts=on,refcount_bits=4",
    ]

    static let options = [
        "", "cluster_size=512", "compat=0.10", "cluster_size=512,refcount_bits=64",
        "cluster_size=4k,refcount_bits=2,lazy_refcounts=on", "extended_l2=on,cluster_size=16k",
        "preallocation=metadata,cluster_size=1k",
    ]

    /// Each option of an image meets each way to amend it; the contents rotate.
    @Test(arguments: some(of: options.indices, with: ways.indices))
    func amendsLikeQemu(_ row: Int, _ column: Int) throws {
        let options = Self.options[row]
        let possible = Content.allCases.filter {
            !options.contains("preallocation") || $0 == .plain || $0 == .snapshots
        }
        let content = possible[(row + column) % possible.count]
        let folder = try make(content, options)
        let hasSnapshot = content == .snapshots || content == .backedSnapshots
        let snapshot = hasSnapshot ? try snapshotContent(folder) : nil
        let twins = try Twins(copying: folder)
        let story = "\(content) \(options) \(Self.ways[column])"
        for way in [Self.ways[column], "compat=1.1", "compat=0.10"] {
            let before = try head(folder)
            let outcome = try twins.run(["amend", "-f", "qcow2", "-o", way, "image"], story)
            try twins.expectSame("image", "qcow2", "\(story): \(way)\n\(outcome)")
            let after = try head(folder)
            let kept = min(before.count, after.count)
            #expect(after.prefix(kept) == before.prefix(kept), "\(story): \(way)")
        }
        // Not compared with qemu-img: where a cluster of zeros has a place that a snapshot uses,
        // its downgrade writes zeros there, too.
        if let snapshot {
            let after = try snapshotContent(folder)
            let kept = min(snapshot.count, after.count)
            #expect(after.prefix(kept) == snapshot.prefix(kept), "\(story): snapshot")
        }
    }

    private func head(_ folder: TempFolder) throws -> Data {
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", "image", "content", in: folder.path)
        return try contents(folder.path("content"))
    }

    private func snapshotContent(_ folder: TempFolder) throws -> Data {
        try Qemu.img(
            "convert", "-l", "s", "-f", "qcow2", "-O", "raw", "image", "content", in: folder.path)
        return try contents(folder.path("content"))
    }

    /// 3 MiB with data, compressed data, zeros with and without a place.
    private func make(_ content: Content, _ options: String) throws -> TempFolder {
        let folder = try TempFolder()
        try writeFilled(folder.path("base"), byte: 9, count: 2 << 20)
        let isBacked = content == .backed || content == .backedSnapshots
        let backing = isBacked ? ["-b", "base", "-F", "raw"] : []
        try require(
            "qemu-img",
            ["create", "-q", "-f", "qcow2"] + (options.isEmpty ? [] : ["-o", options]) + backing
                + ["image", "3M"], in: folder.path)
        let writes = [
            "write -P 1 0 700k", "write -z 100k 64k", "write -z -u 300k 64k",
            "write -z 1M 300k", "write -P 2 2500k 100k",
        ]
        try Qemu.io("qcow2", folder.path("image"), writes)
        if content == .snapshots || content == .backedSnapshots {
            try Qemu.img("snapshot", "-c", "s", folder.path("image"))
            try Qemu.io(
                "qcow2", folder.path("image"), ["write -z 600k 40k", "write -P 3 1200k 100k"])
        }
        return folder
    }

    /// A case of its own, because qemu-img takes minutes for it.
    @Test(arguments: ["refcount_bits=1", "refcount_bits=64"])
    func largeClusters(_ way: String) throws {
        let folder = try make(.plain, "cluster_size=2M")
        let before = try head(folder)
        let outcome = try run(Swimg.path, ["amend", "-o", way, "image"], in: folder.path)
        #expect(outcome.isSuccess && outcome.output.isEmpty, "\(outcome)")
        #expect(try head(folder) == before && Qemu.damage(folder.path("image")) == nil)
    }

    @Test(arguments: [
        "image", "-o foo=1 image", "-o cluster_size=4k image", "-o preallocation=full image",
        "-o compat=2 image", "-o compat=v2 image", "-o lazy_refcounts=foo image",
        "-o refcount_bits=3 image", "-o refcount_bits=128 image", "-o refcount_bits=0 image",
        "-o refcount_bits=x image", "-o size=1000 image", "-o size=1E image", "-o size=0 image",
        "-o backing_file=b image", "-o backing_file=base image", "-o backing_fmt=raw image",
        "-o backing_file=base,backing_fmt=raw image", "-o data_file=x image",
        "-o data_file_raw=on image", "-o data_file_raw=off image", "-o encryption=on image",
        "-o encrypt.state=active image", "-f raw -o size=1M base", "-f foo -o size=1M base",
        "-o size=1M base", "-o size=1M nosuch", "-o size=1M", "-o size=1M image base",
        "-o help", "-o help image", "-f qcow2 -o help", "-f raw -o help", "-f foo -o help",
        "-t foo -o size=1M image", "-o size=4M, image", "-q -p -o size=4M image",
        "--force -o size=4M image", "-o compat=0.10 extended", "-o refcount_bits=8 old",
        "-o lazy_refcounts=on old", "-o compat=0.10,lazy_refcounts=on image",
        "-o compat=0.10 grown", "-o refcount_bits=1 grown", "-o size=8M,size=4M image",
        "-o size=5M -o lazy_refcounts=on image", "-o nolazy_refcounts image",
    ])
    func textAndStatus(_ line: String) throws {
        let folder = try make(.backed, "")
        for (name, options) in [("extended", "extended_l2=on"), ("old", "compat=0.10")] {
            try Qemu.img(
                "create", "-q", "-f", "qcow2", "-o", options, name, "1M", in: folder.path)
        }
        // A snapshot of another size.
        try Qemu.img("create", "-q", "-f", "qcow2", "grown", "1M", in: folder.path)
        try Qemu.io("qcow2", folder.path("grown"), ["write -P 1 0 1M"])
        try Qemu.img("snapshot", "-c", "s", folder.path("grown"))
        try Qemu.img("resize", "-q", "-f", "qcow2", "grown", "2M", in: folder.path)
        let twins = try Twins(copying: folder)
        let theirs = try run("qemu-img", ["amend"] + line.words, in: twins.theirs.path)
        let ours = try run(Swimg.path, ["amend"] + line.words, in: folder.path)
        #expect(ours.status == theirs.status, "\(ours)\n\(theirs)")
        #expect(ours.outputText == theirs.outputText, "\(ours)\n\(theirs)")
        let (own, their) = (withoutName(ours), withoutName(theirs))
        #expect(
            own.hasPrefix(their.prefix { $0 != "\n" }) || line.contains("nosuch")
                || line.contains("1E"), "\(ours)\n\(theirs)")
        for name in ["image", "extended", "old", "grown"] {
            try twins.expectSame(name, "qcow2", line)
        }
    }

    /// qemu-img 7.2 makes such images unreadable, or leaks the bitmap.
    @Test func whatVersion2CannotHave() throws {
        let folder = try TempFolder()
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", "zstd", "1M",
            in: folder.path)
        try Qemu.img("create", "-q", "-f", "qcow2", "bitmap", "1M", in: folder.path)
        try Qemu.img("bitmap", "--add", "bitmap", "b", in: folder.path)
        for (name, words) in [("zstd", "incompatible features 0x8"), ("bitmap", "bitmaps")] {
            let before = try contents(folder.path(name))
            let outcome = try run(
                Swimg.path, ["amend", "-o", "compat=0.10", name], in: folder.path)
            #expect(outcome.status == 1 && outcome.errorText.contains(words), "\(outcome)")
            #expect(try contents(folder.path(name)) == before)
        }
    }

    /// An amend that fails or is killed at any write leaves a valid image with the same disk.
    @Test(
        .enabled(if: canTraceSystemCalls, "strace ends it at a certain write"),
        arguments: ["compat=0.10", "refcount_bits=64", "refcount_bits=8,lazy_refcounts=on"])
    func killedAnywhere(_ way: String) throws {
        let folder = try make(.backedSnapshots, "cluster_size=4k")
        let wanted = folder.path("wanted")
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", folder.path("image"), wanted)
        try disturb(["amend", "-o", way, "image"], in: folder, at: 1...12) { copy, outcome in
            #expect(try Qemu.errors(copy.path("image")) == nil, "\(outcome)")
            let difference = try Qemu.difference(copy.path("image"), "qcow2", wanted, "raw")
            #expect(difference == nil, "\(outcome)")
        }
    }

    /// Clusters that the disk shares with zeros of a snapshot get another refcount and other flags
    /// at once.
    @Test(.enabled(if: canTraceSystemCalls, "strace ends it at a certain write"))
    func killedWhereFlagsChange() throws {
        let folder = try TempFolder()
        let image = folder.path("image")
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "3M")
        try Qemu.io("qcow2", image, ["write -P 1 0 1M"])
        try Qemu.img("snapshot", "-c", "data", image)
        try Qemu.io("qcow2", image, ["write -z 0 512k"])
        try Qemu.img("snapshot", "-c", "s", image)
        try Qemu.img("snapshot", "-a", "data", image)
        try Qemu.img("snapshot", "-d", "data", image)
        let wanted = try (head(folder), snapshotContent(folder))
        func judge(_ copy: TempFolder, _ outcome: Outcome) throws {
            #expect(try Qemu.errors(copy.path("image")) == nil, "\(outcome)")
            #expect(try head(copy) == wanted.0 && snapshotContent(copy) == wanted.1, "\(outcome)")
        }
        let words = ["amend", "-o", "compat=0.10", "image"]
        try disturb(words, in: folder, at: 1...14) { try judge($0, $1) }
        let outcome = try run(Swimg.path, words, in: folder.path)
        try judge(folder, outcome)
        #expect(try outcome.isSuccess && Qemu.damage(image) == nil, "\(outcome)")
        #expect(try Qcow2Fields(image).version == 2)
    }
}
