import Foundation
import TestSupport
import Testing

/// Standard output and FIFOs as targets.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct PipeTargetTests {
    private func shell(_ script: String, in folder: TempFolder) throws -> Outcome {
        let text = script.replacing("{}", with: "\(shellQuoted(Swimg.path)) convert")
        return try run("/bin/bash", ["-c", "set -o pipefail; " + text], in: folder.path)
    }

    private func source(_ name: String) throws -> String {
        let image = try SourceGallery.named(name)
        return "-f \(image.format) \(shellQuoted(image.path))"
    }

    static let scripts = [
        "{} OPTIONS - | cat > out", "{} OPTIONS - > out", "{} OPTIONS /dev/stdout | cat > out",
        "mkfifo pipe; cat pipe > out & {} OPTIONS pipe; wait",
        "{} -W -m 8 OPTIONS - | (sleep 0.1; cat) > out",
    ]

    @Test(arguments: scripts, ["raw-sparse", "chain-deep", "v3-4k", "zeros-written"])
    func rawDisks(_ script: String, _ name: String) throws {
        let folder = try TempFolder()
        let line = script.replacing("OPTIONS", with: "-O raw \(try source(name))")
        let outcome = try shell(line, in: folder)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        try require("cmp", [folder.path("out"), SourceGallery.reference])
    }

    static let options = [
        "", "compat=0.10", "cluster_size=512", "cluster_size=2M", "extended_l2=on",
        "refcount_bits=1", "refcount_bits=64,cluster_size=1k",
    ]

    @Test(arguments: options, ["raw-sparse", "chain-deep", "v3-4k", "zeros-written"])
    func qcow2Images(_ options: String, _ name: String) throws {
        let folder = try TempFolder()
        let words = options.isEmpty ? "" : "-o \(options)"
        var images: [[UInt8]] = []
        for manner in ["-m 1", "-W -m 8"] {
            let outcome = try shell(
                "{} -O qcow2 \(words) \(manner) \(try source(name)) - | cat > out", in: folder)
            try judge(outcome, folder.path("out"), "qcow2", against: SourceGallery.reference)
            images.append(Array(try contents(folder.path("out"))))
        }
        #expect(images[0] == images[1])
    }

    /// Only what differs from the backing file goes through the pipe.
    @Test func overlays() throws {
        let folder = try TempFolder()
        try Qemu.img("create", "-q", "-f", "raw", folder.path("base"), "3M")
        try Qemu.io("raw", folder.path("base"), ["write -P 1 0 3M"])
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", folder.path("over"), "5M")
        try Qemu.io("qcow2", folder.path("over"), ["write -P 2 1M 100k", "write -z 2M 64k"])
        let outcome = try shell(
            "{} -O qcow2 -B base -F raw over - | cat > out", in: folder)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try Qemu.damage(folder.path("out")) == nil)
        #expect(
            try Qemu.difference(folder.path("out"), "qcow2", folder.path("over"), "qcow2") == nil)
        #expect(try contents(folder.path("out")).count < 1 << 20)
    }

    @Test(arguments: [
        ("{} -O qcow2 -c disk - | cat > out", "compressed"),
        ("{} -O qcow2 -o preallocation=metadata disk - | cat > out", "preallocated"),
        ("{} disk - >&-", "standard output is closed"), ("{} disk - > /dev/null", "closed"),
        ("{} -p disk - | cat", "-p"), ("{} --digest disk - | cat", "--digest"),
        ("{} -f raw disk - 1<> disk", "it is the source"),
        ("{} big - | head -c 1000 > out", "Broken pipe"),
        ("cat disk | {} -O qcow2 - - | cat > out", "its end"),
    ])
    func saysWhatIsWrong(_ script: String, _ words: String) throws {
        let folder = try TempFolder()
        try writeFilled(folder.path("disk"), byte: 1, count: 100_000)
        try writeFilled(folder.path("big"), byte: 1, count: 3 << 20)
        let outcome = try shell(script, in: folder)
        #expect(outcome.status == 1, "\(outcome)")
        #expect(outcome.errorText.contains(words), "\(outcome)")
        #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
        #expect(try contents(folder.path("disk")).allSatisfy { $0 == 1 })
    }
}
