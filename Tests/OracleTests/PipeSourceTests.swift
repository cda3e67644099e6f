import Foundation
import TestSupport
import Testing

/// Standard input and FIFOs as sources; the disk itself is the judge.
@Suite(.enabled(if: Qemu.isInstalled, "qemu-img judges"))
struct PipeSourceTests {
    private let folder: TempFolder
    private let raw: String

    init() throws {
        folder = try TempFolder()
        raw = try DiskSketch.oddlySized.writeRaw(folder.path("disk.raw"))
    }

    /// Runs `swimg convert` by a shell, with `{}` for the words up to the source.
    private func shell(_ script: String, _ words: String) throws -> Outcome {
        let command = script.replacingOccurrences(
            of: "{}", with: "\(shellQuoted(Swimg.path)) convert \(words)")
        return try run("/bin/sh", ["-c", "cd \(shellQuoted(folder.path)); \(command)"])
    }

    private func expectEqual(
        _ format: String, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let difference = try Qemu.difference(folder.path("out"), format, raw, "raw")
        #expect(difference == nil, sourceLocation: sourceLocation)
    }

    @Test(arguments: ["raw", "qcow2"], ["raw", "qcow2"])
    func readsPipes(_ source: String, _ target: String) throws {
        try Qemu.img("convert", "-O", "qcow2", raw, folder.path("disk.qcow2"))
        for script in [
            "cat disk.\(source) | {} - out", "{} - out < disk.\(source)",
            "mkfifo pipe; (cat disk.\(source) > pipe &) ; {} pipe out; rm pipe",
            // Pieces that come late, and end in the middle of a block.
            "(head -c 1000; sleep 0.2; cat) < disk.\(source) | {} - out",
        ] {
            let outcome = try shell(script, "-O \(target)")
            #expect(outcome.isSuccess, "\(script): \(outcome)")
            try expectEqual(target)
        }
        let digest = try shell(
            "{} - out < disk.\(source)",
            "--source-digest "
                + sha256(folder.path("disk.\(source)")))
        #expect(digest.isSuccess, "\(digest)")
    }

    @Test(arguments: [
        ("{} - out < /dev/null", "-: standard input is closed"),
        ("{} - out <&-", "-: standard input is closed"),
        ("{} - disk.raw < disk.raw", "it is the source"),
        ("{} - - out < disk.raw", "joined"),
        ("head -c 300000 disk.qcow2 | {} - out", "cut short"),
        ("true | {} - out", "nothing came"),
        ("cat late.qcow2 | {} - out", "one pass"),
    ])
    func saysWhatIsWrong(_ script: String, _ words: String) throws {
        try Qemu.img("convert", "-O", "qcow2", raw, folder.path("disk.qcow2"))
        let late = folder.path("late.qcow2")
        try Qemu.img("create", "-q", "-f", "qcow2", late, "2G")
        try Qemu.io("qcow2", late, ["write -P 1 1G 20M", "write -P 1 0 2M"])
        let before = try sha256(raw)
        let outcome = try shell(script, "-O raw")
        #expect(outcome.status == 1 && outcome.errorText.contains(words), "\(outcome)")
        #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
        #expect(!FileManager.default.fileExists(atPath: folder.path("out")))
        #expect(try sha256(raw) == before)
    }

    /// A reader that waits for bytes that never come ends when it is told to.
    @Test func canBeInterrupted() throws {
        try require("mkfifo", [folder.path("pipe")])
        for script in ["timeout -s INT 1 {} pipe out", "sleep 5 | timeout -s INT 1 {} - out"] {
            let outcome = try shell(script, "-O raw")
            #expect(outcome.status != 0)
            #expect(TempFolder.names(in: folder.path).sorted() == ["disk.raw", "pipe"])
        }
    }
}
