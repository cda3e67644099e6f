import Foundation
import TestSupport
import Testing

/// swimg and qemu-img resize copies of one image.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct ResizeTests {
    private let folder: TempFolder

    init() throws {
        folder = try TempFolder()
        try writeFilled(folder.path("base"), byte: 0x5a, count: 3 << 20)
    }

    static let options = [
        "", "compat=0.10", "cluster_size=512", "cluster_size=512,refcount_bits=64",
        "cluster_size=4k,refcount_bits=1", "cluster_size=4k,refcount_bits=4,lazy_refcounts=on",
        "cluster_size=2M,refcount_bits=32", "extended_l2=on,cluster_size=16k",
        "preallocation=metadata,cluster_size=1k", "compression_type=zstd",
    ]

    static let ways = [
        ["1000448"], ["+512"], ["20M"], ["--shrink 500k"], ["--shrink -512", "+1M"],
        ["--shrink 512", "9M"], ["--preallocation=metadata 9M"], ["--preallocation=falloc +7M"],
        ["--preallocation=full 5M", "--shrink 700k", "--preallocation=metadata 8M"],
        ["300M", "--shrink 1M"], ["-q 1536k"],
    ]

    private enum Content: String, CaseIterable {
        case plain, compressed, backed, snapshot
    }

    /// Each option occurs with each way to resize; the contents rotate.
    @Test(arguments: some(of: options.indices, with: ways.indices))
    func qcow2(_ row: Int, _ column: Int) throws {
        let options = Self.options[row]
        let possible = Content.allCases.filter { isPossible($0, options) }
        let content = possible[(row + column) % possible.count]
        let image = try make(content, options)
        for way in Self.ways[column] { try resizeBoth(image, way, "\(content) \(options)") }
    }

    private func isPossible(_ content: Content, _ options: String) -> Bool {
        switch content {
        case .plain: true
        case .compressed: !options.contains("prealloc")
        // qemu-img cannot hide a backing file in version 2, and no preallocated image has one.
        case .backed: !options.contains("compat=0.10") && !options.contains("prealloc")
        // A 1-bit refcount cannot be shared, and version 2 images with snapshots cannot be resized.
        case .snapshot: !options.contains("compat=0.10") && !options.contains("refcount_bits=1")
        }
    }

    /// 1,000,448 bytes: neither the end of a cluster nor of an L2 table.
    private func make(_ content: Content, _ options: String) throws -> String {
        let image = folder.path("image")
        let words = options.isEmpty ? [] : ["-o", options]
        let backing = content == .backed ? ["-b", folder.path("base"), "-F", "raw"] : []
        try require(
            "qemu-img", ["create", "-q", "-f", "qcow2"] + words + backing + [image, "1000448"])
        switch content {
        case .plain: try Qemu.io("qcow2", image, ["write -P 1 0 1000448", "write -z 64k 64k"])
        case .compressed:
            let raw = folder.path("filled")
            try writeFilled(raw, byte: 2, count: 1_000_448)
            try require(
                "qemu-img", ["convert", "-c", "-f", "raw", "-O", "qcow2"] + words + [raw, image])
        case .backed: try Qemu.io("qcow2", image, ["write -P 1 100k 300k"])
        case .snapshot:
            try Qemu.io("qcow2", image, ["write -P 1 0 1000448"])
            try Qemu.img("snapshot", "-c", "old", image)
            try Qemu.io("qcow2", image, ["write -P 2 300k 300k"])
        }
        return image
    }

    /// Resizes the image with swimg and a copy with qemu-img, and compares; later steps use swimg's
    /// image.
    private func resizeBoth(_ image: String, _ way: String, _ what: String) throws {
        let copy = folder.path("copy")
        try? FileManager.default.removeItem(atPath: copy)
        try FileManager.default.copyItem(atPath: image, toPath: copy)
        let before = try head(of: image)
        let options = Array(way.words.dropLast())
        let size = try #require(way.words.last)
        func line(_ path: String) -> [String] {
            ["resize", "-f", "qcow2"] + options + [path, size]
        }
        let theirs = try run("qemu-img", line(copy))
        let ours = try run(Swimg.path, line(image))
        #expect(ours.status == theirs.status, "\(what): \(ours)\n\(theirs)")
        #expect(ours.outputText == theirs.outputText && withoutName(ours) == withoutName(theirs))
        #expect(try Qemu.damage(image) == nil, "\(what): \(ours)")
        #expect(try info(image, "qcow2") == info(copy, "qcow2"), "\(what): \(ours)")
        // Data beyond the end of a smaller disk must not reappear (with qemu-img it may).
        let after = try head(of: image)
        let kept = min(before.count, after.count)
        #expect(after.prefix(kept) == before.prefix(kept), "\(what): \(ours)")
        #expect(after.dropFirst(kept).allSatisfy { $0 == 0 }, "\(what): \(ours)")
    }

    /// The first 24 MiB of the guest disk.
    private func head(of image: String) throws -> Data {
        let raw = folder.path("content")
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", image, raw)
        defer { try? FileManager.default.removeItem(atPath: raw) }
        let size = try #require(FileStatus(raw)).size
        return Data(try contents(raw, at: 0, count: Int(min(size, 24 << 20))))
    }

    /// A name inside an image is the path of a file: it starts no server and opens no export.
    @Test(arguments: ["[\u{1F}touch\u{1F}started", "nbd://localhost/x", "json:{}", "./image"])
    func namesOutOfHeadersAreFiles(_ name: String) throws {
        try Qemu.img(
            "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", "image", "1M",
            in: folder.path)
        let before = try contents(folder.path("image"))
        let outcome = try run(Swimg.path, ["resize", "image", "+1M"], in: folder.path)
        #expect(outcome.status == 1 && !outcome.errors.isEmpty, "\(outcome)")
        #expect(try mismatch(contents(folder.path("image")), before) == nil, "\(outcome)")
        #expect(FileStatus(folder.path("started")) == nil, "\(outcome)")
    }

    /// The part of the last old cluster that becomes visible gets blocks as new clusters do.
    @Test(arguments: ["falloc", "full"], ["16k", "48k", "80k"])
    func theLastClusterIsPreallocated(_ mode: String, _ growth: String) throws {
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "image", "2000k",
            in: folder.path)
        try require(
            Swimg.path, ["resize", "-q", "--preallocation=\(mode)", "image", "+\(growth)"],
            in: folder.path)
        let image = folder.path("image")
        let before = try #require(FileStatus(image)).allocated
        try Qemu.io("qcow2", image, ["write -P 5 2000k \(growth)"])
        let end = try #require(FileStatus(image)).allocated
        #expect(end == before)
        #expect(try Qemu.damage(image) == nil)
    }

    @Test(arguments: [
        "1M", "+1M", "--shrink 1000", "--shrink -1k", "3000", "--preallocation=falloc 3M",
        "--preallocation=full +1000", "+0", "-q 5M", "-0",
    ])
    func raw(_ way: String) throws {
        try writeFilled(folder.path("image"), byte: 3, count: 2048)
        try writeFilled(folder.path("copy"), byte: 3, count: 2048)
        let words = ["resize", "-f", "raw"] + way.words.dropLast()
        let size = way.words.suffix(1)
        let theirs = try run("qemu-img", words + ["copy"] + size, in: folder.path)
        let ours = try run(Swimg.path, words + ["image"] + size, in: folder.path)
        #expect(ours.status == 0 && ours.outputText == theirs.outputText, "\(ours)\n\(theirs)")
        #expect(ours.errors.isEmpty)
        #expect(try contents(folder.path("image")) == contents(folder.path("copy")), "\(ours)")
        let (own, their) = (FileStatus(folder.path("image")), FileStatus(folder.path("copy")))
        #expect(own?.allocated == their?.allocated, "\(ours)")
    }

    @Test(arguments: [
        "raw 1k", "-f raw raw 1k", "raw 3k", "-f raw raw foo", "-f raw --shrink raw -1M",
        "-f raw --preallocation=metadata raw 1M", "-f raw --preallocation=foo raw 1M",
        "-f raw --shrink --preallocation=full raw 1k", "-f raw raw 7E", "image 512",
        "--shrink image 1000", "image 1E", "--shrink --preallocation=metadata image 512k",
        "image 1000", "-f nosuch image 2M", "old 2M", "--shrink old 1k",
    ])
    func textAndStatus(_ line: String) throws {
        try writeFilled(folder.path("raw"), byte: 3, count: 2048)
        try Qemu.img("create", "-q", "-f", "qcow2", folder.path("image"), "1M")
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", folder.path("old"), "1M")
        try Qemu.img("snapshot", "-c", "then", folder.path("old"))
        let before = try contents(folder.path("image"))
        let ours = try run(Swimg.path, ["resize"] + line.words, in: folder.path)
        #expect(try contents(folder.path("image")) == before)
        try writeFilled(folder.path("raw"), byte: 3, count: 2048)
        let theirs = try run("qemu-img", ["resize"] + line.words, in: folder.path)
        #expect(ours.status == theirs.status, "\(ours)\n\(theirs)")
        #expect(ours.outputText == theirs.outputText, "\(ours)\n\(theirs)")
        // Two messages have several lines in qemu-img but one in swimg.
        let (own, their) = (withoutName(ours), withoutName(theirs))
        #expect(
            own == their || own.contains(their.prefix { $0 != "\n" })
                || own.contains("File too large"), "\(ours)\n\(theirs)")
    }

    /// A resize that fails or is killed at any write leaves at worst leaked clusters, and keeps the
    /// guest's bytes.
    @Test(
        .enabled(if: canTraceSystemCalls, "strace ends it at a certain write"),
        arguments: ["20M", "--preallocation=metadata 3M", "--shrink 300k"])
    func killedAnywhere(_ way: String) throws {
        let image = try make(.snapshot, "cluster_size=4k")
        let before = try head(of: image)
        let name = URL(fileURLWithPath: image).lastPathComponent
        let line = ["resize", "-f", "qcow2"] + way.words.dropLast() + [name] + way.words.suffix(1)
        try disturb(line, in: folder, at: 1...12) { copy, outcome in
            let errors = try Qemu.errors(copy.path(name))
            #expect(errors == nil, "\(outcome)")
            guard !way.contains("shrink") else { return }
            #expect(try head(of: copy.path(name)).prefix(before.count) == before, "\(outcome)")
        }
    }
}
