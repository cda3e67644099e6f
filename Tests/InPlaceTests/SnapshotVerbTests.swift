import Foundation
import TestSupport
import Testing

/// `snapshot -c`, `-a`, `-d` and `-l`, beside qemu-img on a copy of the same image.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct SnapshotVerbTests {
    static let options = [
        "", "compat=0.10", "cluster_size=512", "cluster_size=2M", "extended_l2=on",
        "refcount_bits=64", "refcount_bits=4,cluster_size=4k",
    ]

    /// Random writes and snapshots: after each step both images hold the same disk, in each
    /// snapshot as well.
    @Test(arguments: some(of: options, with: 0..<3))
    func sequences(_ options: String, _ seed: Int) throws {
        let folder = try TempFolder()
        let (own, theirs) = (folder.path("own"), folder.path("theirs"))
        var random = SplitMix64(seed: UInt64(seed))
        let words = options.isEmpty ? [] : ["-o", options]
        try require("qemu-img", ["create", "-q", "-f", "qcow2"] + words + [own, "3M"])
        try require("cp", [own, theirs])
        var names: [String] = []
        var story: [String] = []
        for step in 0..<12 {
            let name = names.isEmpty ? "" : random.pick(names)
            switch random.below(5) {
            case 0 where names.count < 2:
                names.append("s\(step)")
                story.append("-c s\(step)")
                try both(["snapshot", "-c", "s\(step)"], own, theirs)
            case 1 where !names.isEmpty:
                names.removeAll { $0 == name }
                story.append("-d \(name)")
                try both(["snapshot", "-d", name], own, theirs)
            case 2 where !names.isEmpty:
                story.append("-a \(name)")
                try both(["snapshot", "-a", name], own, theirs)
            case 3 where options.contains("compat") == false && random.once(in: 2):
                let size = random.pick(["3M", "5M", "9M"])
                story.append("resize \(size)")
                try Qemu.img("resize", "-q", "--shrink", own, size)
                try Qemu.img("resize", "-q", "--shrink", theirs, size)
            default:
                let kind = random.pick(["write -P \(step + 1)", "write -z", "discard"])
                let command = "\(kind) \(random.below(40) * 64)k \(1 + random.below(400))k"
                story.append(command)
                try Qemu.io("qcow2", own, [command])
                try Qemu.io("qcow2", theirs, [command])
            }
            let state = "\(options) \(seed): \(story)"
            #expect(try Qemu.damage(own) == nil, "\(state)")
            try require("qemu-img", ["compare", "-f", "qcow2", "-F", "qcow2", own, theirs])
            for name in names {
                for image in [own, theirs] {
                    try Qemu.img("convert", "-l", name, "-O", "raw", image, image + ".raw")
                }
                try require("cmp", [own + ".raw", theirs + ".raw"])
            }
            #expect(try list(own, with: "qemu-img").count == names.count, "\(state)")
        }
        try require(Swimg.path, ["check", "-q", own])
    }

    /// Makes the change with swimg to one image and with qemu-img to the other.
    private func both(_ words: [String], _ own: String, _ theirs: String) throws {
        let outcome = try run(Swimg.path, words + [own])
        #expect(outcome.isSuccess && outcome.errors.isEmpty && outcome.outputText.isEmpty)
        try require("qemu-img", words + [theirs])
    }

    private func list(_ image: String, with program: String) throws -> [Substring] {
        try require(program, ["snapshot", "-l", image]).split(separator: "\n").dropFirst(2).map(
            \.self)
    }

    @Test func listsAsQemuDoes() throws {
        let folder = try TempFolder()
        let image = folder.path("image")
        try Qemu.img("create", "-q", "-f", "qcow2", image, "1M")
        for program in [Swimg.path, "qemu-img"] {
            #expect(try require(program, ["snapshot", "-l", image]).isEmpty)
        }
        for name in ["one", "1", ""] { try require(Swimg.path, ["snapshot", "-c", name, image]) }
        let listed = try require("qemu-img", ["snapshot", "-l", image])
        // Without an option, qemu-img 7.2 says nothing; later versions list.
        for words in [["-l"], [], ["-U"], ["-q", "-l"]] {
            #expect(try require(Swimg.path, ["snapshot"] + words + [image]) == listed)
        }
        // An id comes before a name.
        try require(Swimg.path, ["snapshot", "-d", "1", image])
        #expect(
            try list(image, with: "qemu-img").map { $0.split(separator: " ")[0] } == ["2", "3"])
    }

    @Test(arguments: [
        "-d nope", "-a nope", "-c a -d b", "-l -c a", "-a x raw", "-c x raw", "-d x raw", "missing",
    ])
    func refusesWhatQemuRefuses(_ line: String) throws {
        let folder = try TempFolder()
        try Qemu.img("create", "-q", "-f", "qcow2", folder.path("image"), "1M")
        try Qemu.img("create", "-q", "-f", "raw", folder.path("raw"), "1M")
        var words = ["snapshot"] + line.words
        if !line.hasSuffix("raw") && line != "missing" { words.append("image") }
        let before = try contents(folder.path("image"))
        let own = try run(Swimg.path, words, in: folder.path)
        let theirs = try run("qemu-img", words, in: folder.path)
        #expect(own.status == theirs.status && own.status == 1, "\(own)")
        #expect(!own.errors.isEmpty)
        #expect(try contents(folder.path("image")) == before)
        if line.hasSuffix("nope") {
            let text = theirs.errorText.replacing("qemu-img: ", with: "")
            #expect(own.errorText.hasSuffix(text), "\(own)")
        }
    }

    /// A refcount of one bit cannot count a snapshot.
    @Test func countsThatAreTooLargeAreRefusedUntouched() throws {
        let folder = try TempFolder()
        let image = folder.path("image")
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", image, "1M")
        try Qemu.io("qcow2", image, ["write -P 1 0 100k"])
        let before = try contents(image)
        let outcome = try run(Swimg.path, ["snapshot", "-c", "a", image])
        #expect(outcome.status == 1 && outcome.errorText.contains("1 bits"), "\(outcome)")
        #expect(try contents(image) == before)
    }

    /// The saved state of a machine stays with its snapshot, and with the disk that it is applied
    /// to.
    @Test func machineStateIsKept() throws {
        let folder = try TempFolder()
        let image = folder.path("image")
        try Qemu.img("create", "-q", "-f", "qcow2", image, "64M")
        try Qemu.io("qcow2", image, ["write -P 1 0 100k", "write -b -P 7 0 300k"])
        for line in [["-c", "a"], ["-c", "b"], ["-a", "a"], ["-d", "b"]] {
            try require(Swimg.path, ["snapshot"] + line + [image])
            #expect(try Qemu.damage(image) == nil, "\(line)")
        }
        let output = try require("qemu-io", ["-f", "qcow2", "-c", "read -b -P 7 0 300k", image])
        #expect(!output.contains("failed"), "\(output)")
    }
}
