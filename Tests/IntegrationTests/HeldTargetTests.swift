import Foundation
import Glibc
import TestSupport
import Testing

/// Targets that the caller holds open and reads through its own descriptor afterwards.
@Suite struct HeldTargetTests {
    let folder: TempFolder
    let sketch = DiskSketch("A1-b0+-C")

    init() throws {
        folder = try TempFolder()
        try sketch.writeRaw(folder.path("source"))
    }

    /// Shell commands that open descriptor 7 on an unnamed or named file.
    private static let nameless = [
        "unlinked": "exec 7<>held && rm held",
        "unlinked, not empty": "head -c 9000000 /dev/urandom > held; exec 7<>held && rm held",
        "named": "head -c 9000000 /dev/urandom > held; exec 7<>held",
    ]
    private static let commands = [
        "convert -O raw source NAME", "convert -W -O qcow2 source NAME", "dd if=source of=NAME",
        "convert -t none source NAME", "convert -c -O qcow2 source NAME",
    ]

    /// Runs swimg while the shell holds descriptor 7; then copies that descriptor's content to
    /// `result`.
    private func runHolding(_ setUp: String, _ command: String, _ name: String) throws -> Outcome {
        let line = command.replacingOccurrences(of: "NAME", with: name)
        return try run(
            "bash", ["-c", "\(setUp); \"$0\" \(line) && cat /proc/self/fd/7 > result", Swimg.path],
            in: folder.path)
    }

    @Test(arguments: nameless.keys.sorted(), commands)
    func descriptorsAreWrittenInPlace(_ kind: String, _ command: String) throws {
        // Some file systems refuse O_DIRECT when a descriptor is reopened through /proc.
        let setUp = try #require(Self.nameless[kind])
        for name in ["/dev/fd/7", "/proc/self/fd/7", "link"] {
            let link = "rm -f link; ln -s /dev/fd/7 link; \(setUp)"
            let outcome = try runHolding(link, command, name)
            expectSuccess(outcome)
            let format = command.contains("qcow2") ? "qcow2" : "raw"
            expectSuccess(try Swimg.convert("-f", format, "result", "back", in: folder.path))
            #expect(try mismatch(contents(folder.path("back")), sketch.bytes) == nil, "\(outcome)")
            #expect(!folder.names.contains { $0.contains("deleted") }, "\(folder.names)")
        }
    }

    @Test func createAndExistingQcow2() throws {
        let made = try runHolding(
            "exec 7<>held; rm held",
            "create -q -f qcow2 NAME 4M && \"$0\" info NAME > info "
                + "&& \"$0\" convert -n -O qcow2 source NAME", "/dev/fd/7")
        expectSuccess(made)
        expectSuccess(try Swimg.convert("-f", "qcow2", "result", "back", in: folder.path))
        let back = try contents(folder.path("back"))
        #expect(mismatch(back.prefix(sketch.size), sketch.bytes) == nil, "\(made)")
        #expect(folder.names == ["back", "info", "result", "source"])
    }

    @Test(.enabled(if: hasProgram("python3"), "needs python3"))
    func memoryFilesAndUnnamedFiles() throws {
        let script = """
            import os, subprocess, sys
            for make in (lambda: os.memfd_create("m"), lambda: os.open(".", os.O_TMPFILE | os.O_RDWR)):
                held = make()
                for name in (f"/dev/fd/{held}", f"/proc/self/fd/{held}", f"/proc/{os.getpid()}/fd/{held}"):
                    line = [sys.argv[1], "convert", "-O", "raw", "source", name]
                    subprocess.run(line, pass_fds=[held], check=True)
                    assert os.pread(held, 1 << 26, 0) == open("source", "rb").read(), name
                    os.truncate(held, 0)
            """
        expectSuccess(try run("python3", ["-c", script, Swimg.path], in: folder.path))
        #expect(folder.names == ["source"])
    }

    /// mkosi and many other programs make a temporary file, run the converter and read through
    /// their own descriptor.
    @Test(arguments: ["-O raw", "-O qcow2", "-c -W -O qcow2", "-t none", "-t writeback"])
    func emptyFilesKeepTheirPlace(_ options: String) throws {
        let target = try folder.write("target", [])
        let inode = FileStatus(target)?.inode
        let held = open(target, O_RDONLY)
        defer { close(held) }
        expectSuccess(try Swimg.convert(options.words + ["source", "target"], in: folder.path))
        var status = stat()
        #expect(fstat(held, &status) == 0 && status.st_size > 0)
        #expect(FileStatus(target)?.inode == inode && folder.names == ["source", "target"])
        expectSuccess(try Swimg.convert("target", "back", in: folder.path))
        #expect(try mismatch(contents(folder.path("back")), sketch.bytes) == nil)
        // A file that is not empty is replaced; its content stays intact until the new file is
        // complete.
        expectSuccess(try Swimg.convert(options.words + ["source", "target"], in: folder.path))
        #expect(FileStatus(target)?.inode != inode)
    }

    @Test(arguments: [
        "-f qcow2", "-O qcow2 -f qcow2", "-l none",
        "--expect-digest " + String(repeating: "0", count: 64),
        "-W -O qcow2 --expect-digest " + String(repeating: "0", count: 64),
    ])
    func emptyFilesAreEmptiedAgain(_ options: String) throws {
        let target = try folder.write("target", [])
        let inode = FileStatus(target)?.inode
        expectRefusal(try Swimg.convert(options.words + ["source", "target"], in: folder.path))
        #expect(FileStatus(target)?.size == 0 && FileStatus(target)?.inode == inode)
        #expect(folder.names == ["source", "target"])
    }

    @Test func pathsThroughProcAreStagedAsOthers() throws {
        let inode = FileStatus(try folder.write("target", [1, 2, 3]))?.inode
        expectSuccess(try Swimg.convert("source", "/proc/self/cwd/target", in: folder.path))
        #expect(try mismatch(contents(folder.path("target")), sketch.bytes) == nil)
        #expect(FileStatus(folder.path("target"))?.inode != inode)
        #expect(folder.names == ["source", "target"])
    }
}
