import TestSupport
import Testing

/// Internal snapshots as sources (`-l`): the target holds the disk that qemu-img reads.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct SnapshotTests {
    /// Makes an image with three states, with writes between them and a resize before the last one.
    private static func image(
        in folder: TempFolder, options: String = "compat=1.1", backing: String? = nil
    ) throws -> String {
        let path = folder.path("disk.qcow2")
        let base = backing.map { ["-b", $0, "-F", "raw"] } ?? []
        try require(
            "qemu-img", ["create", "-q", "-f", "qcow2", "-o", options] + base + [path, "5M"])
        func write(_ commands: String...) throws { try Qemu.io("qcow2", path, commands) }
        try write("write -P 1 0 1M", "write -P 2 3M 100k")
        try Qemu.img("snapshot", "-c", "first", path)
        try write("write -P 3 512k 1M", "write -z 3M 64k")
        // A name that is the id of another snapshot.
        try Qemu.img("snapshot", "-c", "1", path)
        if !options.contains("0.10") { try Qemu.img("resize", "-q", path, "40M") }
        try write("discard 0 256k", "write -P 4 2M 512k")
        try Qemu.img("snapshot", "-c", "third", path)
        try write("write -P 5 0 5M")
        return path
    }

    static let names = [
        "first", "1", "2", "third", "snapshot.id=2", "snapshot.name=1",
        "snapshot.id=3,snapshot.name=third",
    ]

    @Test(arguments: ["compat=1.1", "compat=0.10", "cluster_size=512", "extended_l2=on"])
    func everyStateIsReadAsQemuReadsIt(_ options: String) throws {
        let folder = try TempFolder()
        let path = try Self.image(in: folder, options: options)
        for name in Self.names {
            try expectSame(name, path, in: folder)
        }
    }

    @Test func statesLieOnTheBackingFile() throws {
        let folder = try TempFolder()
        let base = folder.path("base.raw")
        try require("qemu-img", ["create", "-q", "-f", "raw", base, "5M"])
        try Qemu.io("raw", base, ["write -P 9 0 5M"])
        let path = try Self.image(in: folder, backing: base)
        for name in Self.names { try expectSame(name, path, in: folder) }
    }

    /// Expects the disk that qemu-img reads, and equal output of `measure`.
    private func expectSame(_ name: String, _ path: String, in folder: TempFolder) throws {
        let (own, theirs) = (folder.path("own.raw"), folder.path("theirs.raw"))
        let line = ["convert", "-f", "qcow2", "-O", "raw", "-l", name, path]
        try require("qemu-img", line + [theirs])
        try require(Swimg.path, line + [own])
        try require("cmp", [own, theirs])
        let packed = folder.path("own.qcow2")
        try require(Swimg.path, ["convert", "-c", "-O", "qcow2", "-l", name, path, packed])
        try require("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", theirs, packed])
        let question = ["measure", "-O", "qcow2", "--output=json", "-l", name, path]
        let answers = try (run("qemu-img", question), run(Swimg.path, question))
        #expect(answers.0.outputText == answers.1.outputText, "\(name)")
    }

    /// Expects qemu-img's exit status and an equivalent error line.
    @Test(arguments: [
        ["-l", "4", "disk.qcow2"], ["-l", "snapshot.id=first", "disk.qcow2"],
        ["-l", "snapshot.nam=first", "disk.qcow2"], ["-l", "first", "disk.qcow2", "disk.qcow2"],
        ["-l", "first", "-f", "raw", "disk.qcow2"],
    ])
    func whatIsNotThereIsRefused(_ words: [String]) throws {
        let folder = try TempFolder()
        let path = try Self.image(in: folder)
        let line =
            ["convert", "-O", "raw"] + words.map { $0 == "disk.qcow2" ? path : $0 }
            + [folder.path("out")]
        let (theirs, own) = try (run("qemu-img", line), run(Swimg.path, line))
        #expect(own.status == theirs.status)
        #expect(own.status == 1)
        #expect(own.errorText.split(separator: "\n").count == 1, "\(own)\n\(theirs)")
    }

    /// An impossible snapshot table causes one error line and leaves no target.
    @Test(arguments: [(60, [0xff, 0xff, 0xff, 0xff]), (64, [0x7f, 0xff, 0, 0, 0, 0, 0, 0])])
    func damagedTablesAreRefused(_ place: Int, _ bytes: [UInt8]) throws {
        let folder = try TempFolder()
        let path = try Self.image(in: folder)
        try Qcow2Patcher(path).write(bytes, at: place)
        let own = try run(
            Swimg.path, ["convert", "-O", "raw", "-l", "first", path, folder.path("out")])
        #expect(own.status == 1)
        #expect(own.errorText.split(separator: "\n").count == 1, "\(own)")
    }
}
