import Foundation
import TestSupport
import Testing

/// `map` must match qemu-img's byte for byte in both forms, as must the exit status.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct MapTests {
    /// qemu-img reads the bitmaps and warns.
    static let ownAnswer = ["stale-bitmaps.qcow2"]

    @Test(arguments: Fixture.good)
    func fixture(_ fixture: Fixture) throws {
        guard !Self.ownAnswer.contains(fixture.file) else { return }
        try compareMap([fixture.path()])
        try compareMap(["-s", "700", "-l", "10000", fixture.path(), "-U"])
    }

    /// swimg refuses damaged images, for which qemu-img shows holes instead of missing tables.
    @Test(arguments: Fixture.bad.filter { $0.format == "qcow2" })
    func refusesOrAgrees(_ fixture: Fixture) throws {
        let own = try run(Swimg.path, ["map", "--output=json", fixture.path()], timeout: 10)
        guard own.isSuccess else {
            #expect(own.status == 1, "\(own)")
            #expect(own.errorText.split(separator: "\n").count == 1, "\(own)")
            return
        }
        try compareMap([fixture.path()])
    }

    @Test(arguments: SourceGallery.names)
    func gallery(_ name: String) throws {
        let image = try SourceGallery.named(name)
        try compareMap(["-f", image.format, image.path])
        try compareMap(["--start-offset=1", "--max-length=300000", image.path, "-f", image.format])
    }

    @Test(arguments: [
        "preallocation=metadata", "preallocation=falloc", "preallocation=full",
        "preallocation=metadata,cluster_size=4k", "preallocation=metadata,extended_l2=on",
        "preallocation=metadata,refcount_bits=1", "preallocation=metadata,refcount_bits=64",
    ])
    func preallocated(_ options: String) throws {
        let folder = try TempFolder()
        let path = folder.path("image.qcow2")
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", options, path, "5M")
        try compareMap([path])
        try Qemu.io("qcow2", path, ["write 1M 100k", "write -z 2M 300k", "write 4M 512"])
        try compareMap([path])
    }

    /// Clusters of several layers in an order unrelated to the disk's.
    @Test(arguments: [1, 2, 3, 4])
    func random(_ seed: UInt64) throws {
        var generator = SplitMix64(seed: seed)
        let folder = try TempFolder()
        var below: String?
        for (depth, options) in [
            "cluster_size=4k", "extended_l2=on,cluster_size=16k", "cluster_size=512",
        ].enumerated() {
            let name = "\(depth).qcow2"
            let backing = below.map { ["-b", $0, "-F", "qcow2"] } ?? []
            let size = 400_000 + Int.random(in: 0..<600_000, using: &generator) / 512 * 512
            try require(
                "qemu-img",
                ["create", "-q", "-f", "qcow2", "-o", options] + backing + [name, "\(size)"],
                in: folder.path)
            try Qemu.io(
                "qcow2", folder.path(name),
                (0..<40).map { _ in
                    let what = ["write", "write -z", "write -zu", "discard"].randomElement(
                        using: &generator)
                    let start = Int.random(in: 0..<size / 512 - 64, using: &generator) * 512
                    let length = Int.random(in: 1..<64, using: &generator) * 512
                    return "\(what ?? "write") \(start) \(length)"
                })
            below = name
            try compareMap([name], in: folder.path)
        }
    }

    @Test(arguments: [
        "-s 1M", "-s 5M", "-l 0", "-l 7 -s 7", "-l -1", "-s x", "--output=xml", "-f nosuch",
        "--nosuch",
    ])
    func commandLines(_ words: String) throws {
        let folder = try TempFolder()
        try DiskSketch("A-B0").writeQcow2(folder.path("a"))
        try compareMap(words.words + ["a"], in: folder.path)
        try compareMap(["a"] + words.words, in: folder.path)
    }

    @Test func emptyDisks() throws {
        let folder = try TempFolder()
        try Qemu.img("create", "-q", "-f", "qcow2", folder.path("a"), "0")
        try Qemu.img("create", "-q", "-f", "raw", folder.path("b"), "0")
        try compareMap([folder.path("a")])
        try compareMap([folder.path("b")])
    }

    @Test(.enabled(if: NBDTestServer.isInstalled, "qemu-nbd and nbdkit"))
    func exports() throws {
        let folder = try TempFolder()
        try DiskSketch("A-B0-1").writeQcow2(folder.path("a"))
        let server = try NBDTestServer.qemu("-f", "qcow2", "-r", folder.path("a"))
        try compareMap([server.uri])
        let bare = try NBDTestServer.qemu("-f", "raw", "-r", folder.path("a"))
        try compareMap([bare.uri])
    }

    /// Each letter is a cell, and the sums match the map.
    @Test func picture() throws {
        let folder = try TempFolder()
        let path = folder.path("a")
        try DiskSketch("AA--1100----AAAA", cluster: 65536).writeQcow2(path)
        let outcome = try run(
            Swimg.path, ["map", "--output=picture", path], environment: ["LC_ALL": "C"])
        #expect(outcome.isSuccess, "\(outcome)")
        let cells = outcome.outputText.split(separator: "\n").dropFirst().prefix {
            !$0.hasPrefix("  D")
        }
        .map { $0.dropFirst(11) }.joined()
        // 1 MiB in 1024 cells of 1 KiB, 64 for each cluster.
        let expected = "AA--1100----AAAA".map { letter in
            String(repeating: letter == "-" ? "." : letter == "0" ? "z" : "D", count: 64)
        }.joined()
        #expect(cells == expected, "\(outcome)")
        #expect(outcome.outputText.contains("50.0 %"), "\(outcome)")
        #expect(!outcome.output.contains(0x1b), "colours are for terminals")
    }

    @Test func pictureAsSVG() throws {
        let folder = try TempFolder()
        try DiskSketch("A-1", cluster: 65536).writeQcow2(folder.path("a <&> b"))
        let outcome = try run(
            Swimg.path,
            ["map", "--output=picture", "--svg", folder.path("svg"), folder.path("a <&> b")])
        #expect(outcome.isSuccess && outcome.output.isEmpty, "\(outcome)")
        let text = String(decoding: try contents(folder.path("svg")), as: UTF8.self)
        #expect(text.hasPrefix("<svg ") && text.hasSuffix("</svg>\n"))
        #expect(text.contains("a &lt;&amp;&gt; b: 192 KiB"))
    }
}

/// Expects qemu-img's exit status and, on success, its output in both forms.
func compareMap(
    _ words: [String], in folder: String? = nil, at location: SourceLocation = #_sourceLocation
) throws {
    for form in [[], ["--output=json"]] {
        let theirs = try run("qemu-img", ["map"] + form + words, in: folder)
        let own = try run(Swimg.path, ["map"] + form + words, in: folder)
        #expect(own.status == theirs.status, "\(own)\n\(theirs)", sourceLocation: location)
        #expect(own.errors.isEmpty == theirs.errors.isEmpty, "\(own)", sourceLocation: location)
        guard theirs.isSuccess || !theirs.output.isEmpty, own.errors.isEmpty else { continue }
        let same = own.outputText == theirs.outputText
        #expect(same, "\(own)\n\(theirs)", sourceLocation: location)
    }
}
