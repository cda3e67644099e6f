import Foundation
import TestSupport
import Testing

/// `measure` prints qemu-img's numbers, and conversions do not exceed them.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct MeasureTests {
    static let options = [
        "compat=1.1", "compat=0.10", "cluster_size=512", "cluster_size=4k", "cluster_size=2M",
        "extended_l2=on", "extended_l2=on,cluster_size=16k,refcount_bits=2", "refcount_bits=1",
        "refcount_bits=64,cluster_size=512", "preallocation=full", "preallocation=falloc",
        "preallocation=metadata,lazy_refcounts=on", "backing_file=x,backing_fmt=raw",
        "compression_type=zstd,nocow=on",
    ]

    private func expectSame(
        _ arguments: [String], at location: SourceLocation = #_sourceLocation
    ) throws {
        let theirs = try run("qemu-img", ["measure"] + arguments)
        let own = try run(Swimg.path, ["measure"] + arguments)
        #expect(own.status == theirs.status, "\(own)\n\(theirs)", sourceLocation: location)
        #expect(own.outputText == theirs.outputText, "\(own)\n\(theirs)", sourceLocation: location)
        #expect(own.errors.isEmpty == theirs.errors.isEmpty, "\(own)", sourceLocation: location)
    }

    @Test(arguments: options)
    func emptyDisks(_ options: String) throws {
        for size in ["0", "1", "511", "65537", "1023.5M", "3G", "123456789", "10T", "63P"] {
            for output in ["human", "json"] {
                try expectSame(
                    ["-O", "qcow2", "-o", options, "--size", size, "--output", output])
            }
            try expectSame(["--size", size])
        }
    }

    @Test(arguments: some(12, of: SourceGallery.names))
    func gallery(_ name: String) throws {
        let image = try SourceGallery.named(name)
        for options in Self.options {
            try expectSame(
                ["-O", "qcow2", "-f", image.format, image.path, "-o", options, "--output=json"])
        }
        try expectSame(["-U", "-O", "raw", "-f", image.format, image.path])
    }

    @Test(arguments: Fixture.good.filter { $0.format != nil })
    func fixtures(_ fixture: Fixture) throws {
        let path = try fixture.path()
        for options in ["compat=1.1", "cluster_size=512", "compat=0.10"] {
            let arguments = ["-O", "qcow2", "-f", fixture.format ?? "raw", "-o", options, path]
            let theirs = try run("qemu-img", ["measure"] + arguments)
            let own = try run(Swimg.path, ["measure"] + arguments)
            #expect(own.status == theirs.status, "\(own)\n\(theirs)")
            #expect(own.outputText == theirs.outputText, "\(own)\n\(theirs)")
        }
    }

    /// Complete bitmaps count; bitmaps left in use by a crash do not.
    @Test func bitmaps() throws {
        let folder = try TempFolder()
        let path = folder.path("image.qcow2")
        try Qemu.img("create", "-q", "-f", "qcow2", path, "10G")
        for (name, granularity) in [("a", "64k"), ("a-longer-name", "1M"), ("fine", "512")] {
            try Qemu.img("bitmap", "--add", "-g", granularity, path, name)
            for options in Self.options {
                try expectSame(["-O", "qcow2", "-o", options, "--output=json", path])
            }
        }
    }

    /// A conversion stores at most `required` bytes, compressed or not.
    @Test(arguments: ["raw-full", "raw-sparse", "v3-64k", "chain-deep", "zstd-4k"])
    func conversionsKeepToIt(_ name: String) throws {
        let image = try SourceGallery.named(name)
        let folder = try TempFolder()
        struct Answer: Decodable { let required: Int64 }
        for options in ["compat=1.1", "compat=0.10", "cluster_size=512", "cluster_size=2M"] {
            let text = try require(
                Swimg.path,
                ["measure", "--output=json", "-O", "qcow2", "-o", options, "-f", image.format]
                    + [image.path])
            let answer = try JSONDecoder().decode(Answer.self, from: Data(text.utf8))
            for mode in [["-W"], ["-c"]] {
                let outcome = try Swimg.convert(
                    mode + ["-O", "qcow2", "-o", options, "-f", image.format, image.path]
                        + [folder.path("target")])
                let size = try #require(FileStatus(folder.path("target"))).size
                #expect(outcome.isSuccess && size <= answer.required, "\(outcome): \(size)")
            }
        }
    }

    @Test(arguments: [
        "", "--size 1G file", "file file", "--size nothing", "--size -1", "--size 9E",
        "-O nothing --size 1", "-o unknown=1 --size 1", "-O qcow2 -o unknown=1 --size 1",
        "-O qcow2 -o cluster_size=3k --size 1G", "-O qcow2 -o cluster_size=256 --size 1G",
        "-O qcow2 -o compat=0.9 --size 1G", "-O qcow2 -o refcount_bits=3 --size 1G",
        "-O qcow2 -o refcount_bits=1,compat=0.10 --size 1G", "-O qcow2 -o size=2G",
        "-O qcow2 -o preallocation=nothing --size 1G", "-O qcow2 -o extended_l2=maybe --size 1G",
        "-O qcow2 -o extended_l2=on,cluster_size=4k --size 1G", "--output=nothing --size 1",
        "-f qcow2 --size 1G", "-O qcow2 -o cluster_size=512 --size 1P",
    ])
    func refusals(_ line: String) throws {
        let theirs = try run("qemu-img", ["measure"] + line.words)
        let own = try run(Swimg.path, ["measure"] + line.words)
        #expect(own.status == theirs.status && own.output == theirs.output, "\(own)\n\(theirs)")
        // qemu-img breaks one of its lines.
        let reason = theirs.errorText.dropFirst("qemu-img: ".count).prefix { $0 != "\n" }
        #expect(own.errorText.hasPrefix(Swimg.prefix + reason), "\(own)\n\(theirs)")
    }
}
