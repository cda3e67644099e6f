import Foundation
import TestSupport
import Testing

/// `bitmap`, beside qemu-img on a copy of the same image.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct BitmapVerbTests {
    private func both(
        _ words: [String], _ own: String, _ theirs: String, after: [String] = []
    ) throws {
        let outcome = try run(Swimg.path, ["bitmap"] + words + [own] + after)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        try require("qemu-img", ["bitmap"] + words + [theirs] + after)
    }

    /// Random changes and writes: both images have the same bitmaps with the same bits.
    @Test(
        arguments: ["cluster_size=64k", "cluster_size=512", "cluster_size=2M", "extended_l2=on"],
        some(2, of: Array(0..<6)))
    func sequences(_ options: String, _ seed: Int) throws {
        let folder = try TempFolder()
        let (own, theirs) = (folder.path("own"), folder.path("theirs"))
        var random = SplitMix64(seed: UInt64(seed))
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", options, own, "9M")
        try require("cp", [own, theirs])
        var names: [String] = []
        for step in 0..<14 {
            let name = names.isEmpty ? "" : random.pick(names)
            switch random.below(6) {
            case 0, 1:
                names.append("b\(step)")
                let words = random.pick([
                    ["--add"], ["--add", "-g", "512"], ["--add", "--disable"],
                    ["--add", "-g", "1M"],
                ])
                try both(words, own, theirs, after: ["b\(step)"])
            case 2 where !names.isEmpty:
                names.removeAll { $0 == name }
                try both(["--remove"], own, theirs, after: [name])
            case 3 where !names.isEmpty:
                let words = random.pick(["--clear", "--enable", "--disable"])
                try both([words], own, theirs, after: [name])
            case 4 where names.count > 1:
                try both(["--merge", random.pick(names)], own, theirs, after: [name])
            default:
                let command = "write -P \(step + 1) \(random.below(900) * 8)k 100k"
                try Qemu.io("qcow2", own, [command])
                try Qemu.io("qcow2", theirs, [command])
            }
            #expect(try Qemu.damage(own) == nil)
            try require("qemu-img", ["compare", "-f", "qcow2", "-F", "qcow2", own, theirs])
            #expect(try bitmaps(own) == bitmaps(theirs))
            for name in names {
                #expect(try Qemu.bitmap(name, of: own) == Qemu.bitmap(name, of: theirs))
            }
        }
    }

    /// The lines of `info` about bitmaps.
    private func bitmaps(_ image: String) throws -> [String] {
        try Qemu.img("info", image).components(separatedBy: "\n").drop { !$0.contains("bitmaps:") }
            .map { $0 }
    }

    /// As later versions of qemu-img have it; a name is not needed.
    @Test(arguments: [["image"], ["image", "one"]])
    func removesAll(_ words: [String]) throws {
        let folder = try TempFolder()
        try Qemu.img("create", "-q", "-f", "qcow2", "image", "9M", in: folder.path)
        for name in ["one", "two"] {
            try Qemu.img("bitmap", "--add", "image", name, in: folder.path)
        }
        let outcome = try run(Swimg.path, ["bitmap", "--remove-all"] + words, in: folder.path)
        #expect(outcome.isSuccess && outcome.output.isEmpty && outcome.errors.isEmpty)
        #expect(try bitmaps(folder.path("image")).isEmpty)
        #expect(try Qemu.damage(folder.path("image")) == nil)
        let other = try run(Swimg.path, ["bitmap", "--add", "image"], in: folder.path)
        #expect(other.status == 1 && other.errorText.contains("filename and bitmap name"))
    }

    @Test func mergesFromAnotherImage() throws {
        let folder = try TempFolder()
        let (own, theirs) = (folder.path("own"), folder.path("theirs"))
        let other = folder.path("other")
        for image in [own, other] {
            try Qemu.img("create", "-q", "-f", "qcow2", image, "9M")
            try Qemu.img("bitmap", "--add", image, "b")
        }
        try Qemu.io("qcow2", other, ["write 1M 100k"])
        try require("cp", [own, theirs])
        try both(["--merge", "b", "-b", other, "-F", "qcow2"], own, theirs, after: ["b"])
        #expect(try Qemu.bitmap("b", of: own) == Qemu.bitmap("b", of: theirs))
        #expect(try Qemu.bitmap("b", of: own).count == 1)
    }

    @Test(arguments: [
        "--add image there", "--remove image c", "--clear image c", "image c",
        "--add -g 1 image d", "--add -g 100 image d", "--add -g 4G image d",
        "--merge x image there", "--merge b -b larger -F qcow2 image there",
        "-g 64k --clear image there", "--add image",
        "-b x --add image q", "--add v2 q", "--add raw q",
    ])
    func refusesWhatQemuRefuses(_ line: String) throws {
        let folder = try TempFolder()
        try Qemu.img("create", "-q", "-f", "qcow2", folder.path("image"), "1M")
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", folder.path("v2"), "1M")
        try Qemu.img("create", "-q", "-f", "raw", folder.path("raw"), "1M")
        try Qemu.img("bitmap", "--add", folder.path("image"), "there")
        try Qemu.img("create", "-q", "-f", "qcow2", folder.path("larger"), "1025k")
        try Qemu.img("bitmap", "--add", folder.path("larger"), "b")
        let before = try contents(folder.path("image"))
        let words = ["bitmap"] + line.words
        let own = try run(Swimg.path, words, in: folder.path)
        #expect(try contents(folder.path("image")) == before)
        let theirs = try run("qemu-img", words, in: folder.path)
        #expect(own.status == theirs.status && own.status == 1, "\(own)")
        // Storages have no names of their own here.
        if !line.contains("v2"), !line.contains("raw") {
            let text = theirs.errorText.replacing("qemu-img: ", with: "")
            #expect(own.errorText.hasSuffix(text), "\(own)\n\(theirs)")
        }
    }

    /// An image with an enabled and a disabled bitmap, and one that was not saved properly if asked
    /// for.
    private func image(_ name: String, _ folder: TempFolder, isBroken: Bool = false) throws
        -> String
    {
        let path = folder.path(name)
        try Qemu.img("create", "-q", "-f", "qcow2", path, "9M")
        try Qemu.img("bitmap", "--add", path, "one")
        try Qemu.img("bitmap", "--add", "-g", "512", path, "two")
        try Qemu.io("qcow2", path, ["write 1M 100k", "write 5M 4M"])
        try Qemu.img("bitmap", "--disable", path, "two")
        try Qemu.io("qcow2", path, ["write 3M 100k"])
        if isBroken {
            // The directory begins with the first bitmap, whose flags are at byte 12.
            let patcher = try Qcow2Patcher(path)
            let directory = try Qcow2Fields(path).bitmapDirectory
            try patcher.change(directory + 8) { $0 | 1 }
        }
        return path
    }

    @Test(arguments: ["", "-W -m 8", "-c", "-o cluster_size=4k", "-n"])
    func areConverted(_ mode: String) throws {
        let folder = try TempFolder()
        let source = try image("source", folder)
        let (own, theirs) = (folder.path("own"), folder.path("theirs"))
        if mode == "-n" {
            for target in [own, theirs] {
                try Qemu.img("create", "-q", "-f", "qcow2", target, "9M")
            }
        }
        let line = ["convert", "--bitmaps", "-O", "qcow2"] + mode.words + [source]
        let outcome = try run(Swimg.path, line + [own])
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        try require("qemu-img", line + [theirs])
        #expect(try Qemu.damage(own) == nil)
        #expect(try bitmaps(own) == bitmaps(theirs))
        for name in ["one", "two"] {
            #expect(try Qemu.bitmap(name, of: own) == Qemu.bitmap(name, of: source))
        }
        #expect(try Qemu.difference(own, "qcow2", source, "qcow2") == nil)
    }

    @Test func brokenOnesAreLeftOut() throws {
        let folder = try TempFolder()
        let source = try image("source", folder, isBroken: true)
        let own = folder.path("own")
        let refused = try run(Swimg.path, ["convert", "--bitmaps", "-O", "qcow2", source, own])
        #expect(refused.status == 1 && refused.errorText.contains("inconsistent bitmap 'one': Try"))
        #expect(!FileManager.default.fileExists(atPath: own))
        let line = ["convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", source, own]
        let outcome = try run(Swimg.path, line)
        #expect(outcome.isSuccess && outcome.errorText.contains("Skipping inconsistent"))
        #expect(try Qemu.bitmap("two", of: own) == Qemu.bitmap("two", of: source))
        #expect(!(try Qemu.img("info", own).contains("name: one")))
        for words in [["resize", source, "20M"], ["amend", "-o", "size=20M", source]] {
            let resized = try run(Swimg.path, words)
            #expect(resized.status == 1 && resized.errorText.contains("is inconsistent"))
        }
    }

    @Test(arguments: [
        "convert --bitmaps -f raw -O qcow2 raw out", "convert --bitmaps -O raw source out",
        "convert --bitmaps -O qcow2 v2 out",
        "convert --bitmaps -O qcow2 -o compat=0.10 source out",
        "convert --skip-broken-bitmaps -O qcow2 source out",
        "convert --bitmaps -O qcow2 source source out",
    ])
    func conversionsThatCannotHaveThem(_ line: String) throws {
        let folder = try TempFolder()
        _ = try image("source", folder)
        try Qemu.img("create", "-q", "-f", "raw", folder.path("raw"), "1M")
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", folder.path("v2"), "1M")
        let own = try run(Swimg.path, line.words, in: folder.path)
        #expect(own.status == 1 && folder.names == ["raw", "source", "v2"], "\(own)")
        let theirs = try run("qemu-img", line.words, in: folder.path)
        let text = theirs.errorText.replacing("qemu-img: ", with: "")
        #expect(own.errorText.hasSuffix(text), "\(own)\n\(theirs)")
    }

    /// Bitmaps follow a disk that gets another size, in a size that does not fill their last byte.
    @Test(arguments: ["9217k", "20M", "3M", "1025k"], ["resize", "amend"])
    func areResized(_ size: String, _ verb: String) throws {
        let folder = try TempFolder()
        let own = try image("own", folder)
        let theirs = folder.path("theirs")
        try require("cp", [own, theirs])
        for size in [size, "12M"] {
            for (program, image) in [(Swimg.path, own), ("qemu-img", theirs)] {
                try require(
                    program,
                    verb == "resize"
                        ? ["resize", "-q", "--shrink", image, size]
                        : ["amend", "-o", "size=\(size)", image])
            }
            #expect(try Qemu.damage(own) == nil)
            #expect(try bitmaps(own) == bitmaps(theirs))
            for name in ["one", "two"] {
                #expect(try Qemu.bitmap(name, of: own) == Qemu.bitmap(name, of: theirs))
            }
        }
    }
}
