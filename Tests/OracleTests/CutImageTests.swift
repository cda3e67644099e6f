import Foundation
import Glibc
import TestSupport
import Testing

/// Images that end before their data does, like those of an interrupted download.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct CutImageTests {
    let folder: TempFolder
    private var image: String { folder.path("image") }

    init() throws { folder = try TempFolder() }

    /// Creation options, and whether the clusters are compressed.
    static let kinds = [
        ("cluster_size=64k", false), ("cluster_size=512", false), ("cluster_size=2M", false),
        ("extended_l2=on,cluster_size=64k", false), ("compat=0.10", false),
        ("cluster_size=64k", true), ("compression_type=zstd", true),
    ]

    @Test(arguments: kinds)
    func missingClustersAreRefused(_ kind: (options: String, compressed: Bool)) throws {
        try makeImage(kind)
        let size = try #require(FileStatus(image)?.size)
        let clusterSize = Int64(1) << Int64(try Qcow2Fields(image).clusterBits)
        // A sector holds several compressed clusters.
        let cut = kind.compressed ? size - 2048 : size.roundedUp(to: clusterSize) - clusterSize
        #expect(truncate(image, Int(cut)) == 0)
        try writeFilled(folder.path("zeros"), byte: 0, count: 6 << 20)

        let lines = [
            "convert -f qcow2 -O raw image out", "convert -f qcow2 -O qcow2 -W image out",
            "convert -n -f qcow2 -O raw image zeros", "convert -f qcow2 -O qcow2 -c image out",
            "digest -f qcow2 image", "convert --digest -O raw image out",
            "dd -f qcow2 -O raw if=image of=out bs=64k",
        ]
        for line in lines {
            let outcome = try run(Swimg.path, line.words, in: folder.path)
            #expect(outcome.status == 1, "\(outcome)")
            expectNamed(outcome, cut)
        }
        try writeFilled(folder.path("zeros"), byte: 0, count: 6 << 20)
        for line in ["compare image zeros", "compare zeros image"] {
            let outcome = try run(Swimg.path, line.words, in: folder.path)
            // Existing data may differ before the missing part is reached.
            #expect(outcome.status == 1 || outcome.status == 4, "\(outcome)")
            if outcome.status == 4 { expectNamed(outcome, cut) }
        }
        // Compared with an intact image, only the missing part differs.
        let whole = try run(Swimg.path, ["compare", "image", "whole"], in: folder.path)
        #expect(whole.status == 4, "\(whole)")
        expectNamed(whole, cut)
        // An equally truncated image does not compare as identical either.
        try FileManager.default.copyItem(atPath: image, toPath: folder.path("again"))
        for strict in [[], ["-s"]] {
            let again = try run(
                Swimg.path, ["compare"] + strict + ["image", "again"], in: folder.path)
            #expect(again.status == 4, "\(again)")
            expectNamed(again, cut)
        }

        for line in ["info", "map", "map --output=json", "measure -O raw", "measure -O qcow2"] {
            let words = line.words + ["-f", "qcow2", "image"]
            let own = try run(Swimg.path, words, in: folder.path)
            let theirs = try run("qemu-img", words, in: folder.path)
            #expect(own.isSuccess == theirs.isSuccess, "\(own)\n\(theirs)")
            #expect(own.outputText == theirs.outputText, "\(own)\n\(theirs)")
        }
        let words = ["check", "--output=json", "-f", "qcow2", "image"]
        let own = try run(Swimg.path, words, in: folder.path)
        let theirs = try run("qemu-img", words, in: folder.path)
        #expect(
            own.status == theirs.status && own.outputText == theirs.outputText, "\(own)\n\(theirs)")
        // The sectors of a stream may end less than a cluster after the end of the file.
        if !kind.compressed { #expect(own.status == 2, "\(own)") }
    }

    /// Expects one line with guest offset, host offset and file size.
    private func expectNamed(
        _ outcome: Outcome, _ size: Int64, at location: SourceLocation = #_sourceLocation
    ) {
        let text = outcome.errorText
        let isNamed =
            text.contains("cluster of guest offset ") && text.contains(" at offset ")
            && text.contains("(\(size) bytes): the image is cut short")
        // A part of the last stream may exist.
        let isStream = text.contains("cannot decompress the cluster of guest offset ")
        #expect(
            (isNamed || isStream) && text.count(where: { $0 == "\n" }) == 1, "\(outcome)",
            sourceLocation: location)
    }

    private func makeImage(_ kind: (options: String, compressed: Bool)) throws {
        try writeNoise(folder.path("noise"), count: 5 << 20)
        let way = kind.compressed ? ["-c"] : []
        // Noise would not be stored compressed.
        let source = kind.compressed ? folder.path("words") : folder.path("noise")
        if kind.compressed { try DiskSketch("ABCDEFGH", cluster: 640 << 10).writeRaw(source) }
        try require(
            "qemu-img",
            ["convert"] + way + ["-f", "raw", "-O", "qcow2", "-o", kind.options, source, image])
        try FileManager.default.copyItem(atPath: image, toPath: folder.path("whole"))
    }

    /// With extended L2 entries only whole clusters count: in a cluster that begins before the end
    /// of the file, the subclusters after the end are zeros.
    @Test func aSubclusterBehindTheEndIsNotACluster() throws {
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=64k", image, "1M")
        try Qemu.io("qcow2", image, ["write -P 1 0 64k", "write -P 2 64k 64k"])
        let size = try #require(FileStatus(image)?.size)
        #expect(truncate(image, Int(size.roundedUp(to: 65536) - 65536 + 5000)) == 0)
        for format in ["raw", "qcow2"] {
            let outcome = try Swimg.convert("-f", "qcow2", "-O", format, image, folder.path("out"))
            try judge(outcome, folder.path("out"), format, against: image, "qcow2")
        }
    }

    static let created = ["off", "metadata", "falloc", "full"].flatMap { mode in
        ["512", "4k", "64k", "2M"].map { "preallocation=\(mode),cluster_size=\($0)" }
            + ["16k", "64k", "2M"].map {
                "preallocation=\(mode),cluster_size=\($0),extended_l2=on"
            } + ["preallocation=\(mode),compat=0.10"]
    }

    /// Images made by qemu never count as truncated: fresh, grown or written to.
    @Test(arguments: some(8, of: created))
    func whatQemuMakesIsWhole(_ options: String) throws {
        for size in [3_000_320, 1 << 20] {
            try Qemu.img("create", "-q", "-f", "qcow2", "-o", options, image, "\(size)")
            try expectReadable()
            for mode in ["off", "metadata", "falloc", "full"] {
                let new = try Qcow2Fields(image).virtualSize + 700_416
                try Qemu.img(
                    "resize", "-q", "-f", "qcow2", "--preallocation=\(mode)", image, "\(new)")
                try expectReadable()
            }
            let end = try Qcow2Fields(image).virtualSize
            for command in [
                "write -P 7 \(end - 512) 512", "write -P 7 700k 3k", "write -z 0 100k",
                "write -P 1 5k 512", "discard 600k 64k", "write -z -u \(end - 1024) 1024",
                "truncate \(end + 65536)",
            ] {
                try Qemu.io("qcow2", image, [command])
                try expectReadable()
            }
            try Qemu.img("snapshot", "-c", "s", image)
            try Qemu.io("qcow2", image, ["write -P 3 200k 1k"])
            try expectReadable()
        }
    }

    @Test(arguments: ["zlib,cluster_size=512", "zlib,cluster_size=64k", "zstd,cluster_size=2M"])
    func whatQemuCompressesIsWhole(_ options: String) throws {
        try DiskSketch("A-1b0+--C", cluster: 100_000, size: 900_096).writeRaw(folder.path("disk"))
        try Qemu.img(
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=\(options)",
            folder.path("disk"), image)
        try expectReadable()
    }

    private func expectReadable(at location: SourceLocation = #_sourceLocation) throws {
        let outcome = try run(Swimg.path, ["digest", "-f", "qcow2", image])
        #expect(
            outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)", sourceLocation: location)
    }
}

extension Int64 {
    fileprivate func roundedUp(to unit: Int64) -> Int64 { (self + unit - 1) / unit * unit }
}
