import Foundation
import TestSupport
import Testing

/// A failed write to standard output is a failure, but the result of the work stays.
@Suite struct OutputTests {
    let folder: TempFolder

    init() throws {
        folder = try TempFolder()
        try DiskSketch("A-1b0+-", cluster: 65536).writeRaw(folder.path("disk"))
        for name in ["a.qcow2", "b.qcow2"] {
            let outcome = try Swimg.convert(
                "-f", "raw", "-O", "qcow2", folder.path("disk"), folder.path(name))
            try #require(outcome.isSuccess)
        }
    }

    /// Runs a script in which `$0` is swimg and which chooses its standard output.
    private func shell(_ script: String) throws -> Outcome {
        try run("bash", ["-c", script, Swimg.path], in: folder.path)
    }

    static let lines: [(String, Int32)] = [
        ("digest -f raw disk", 1), ("digest --output=json disk", 1),
        ("convert --digest disk out", 1), ("convert -O qcow2 -o help disk out", 1),
        ("map a.qcow2", 1), ("map --output=json disk", 1), ("map --output=picture disk", 1),
        ("info a.qcow2", 1), ("info --output=json disk", 1),
        ("measure -O qcow2 disk", 1), ("measure --size 1G --output=json", 1),
        ("check a.qcow2", 1), ("check --output=json a.qcow2", 1),
        ("create -f qcow2 out 1M", 1), ("create -f raw out 1M", 1), ("create -o help", 1),
        ("resize -f raw disk +1M", 1), ("resize a.qcow2 +1M", 1),
        ("compare a.qcow2 b.qcow2", 2), ("compare -p a.qcow2 disk", 2),
        ("--help", 1), ("info --help", 1), ("help", 1), ("--version", 1), ("-V", 1),
        ("--generate-completion-script bash", 1),
    ]

    @Test(arguments: lines)
    func aFullDiskIsAFailure(_ line: String, _ status: Int32) throws {
        let outcome = try shell("exec \"$0\" \(line) > /dev/full")
        #expect(outcome.status == status, "\(outcome)")
        #expect(
            outcome.errorText
                == Swimg.prefix + "cannot write the output: No space left on device\n", "\(outcome)"
        )
    }

    /// A closed pipe ends swimg silently, as SIGPIPE ends other programs.
    @Test(arguments: lines)
    func aClosedPipeEndsQuietly(_ line: String, _ status: Int32) throws {
        let outcome = try shell("(sleep 0.2; exec \"$0\" \(line)) | true; exit ${PIPESTATUS[0]}")
        #expect(outcome.status == 128 + SIGPIPE && outcome.errors.isEmpty, "\(outcome)")
    }

    @Test(arguments: lines)
    func aClosedPipeIsAFailureWhereTheSignalIsIgnored(_ line: String, _ status: Int32) throws {
        let outcome = try shell(
            "trap '' PIPE; (sleep 0.2; exec \"$0\" \(line)) | true; exit ${PIPESTATUS[0]}")
        #expect(outcome.status == status, "\(outcome)")
        #expect(
            outcome.errorText == Swimg.prefix + "cannot write the output: Broken pipe\n",
            "\(outcome)")
    }

    @Test func theWorkIsDone() throws {
        let made = [
            "create -f qcow2 created 1M", "resize -f raw disk 1M", "convert --digest a.qcow2 out",
        ]
        for line in made { _ = try shell("exec \"$0\" \(line) > /dev/full") }
        #expect(try Qcow2Fields(folder.path("created")).virtualSize == 1 << 20)
        #expect(FileStatus(folder.path("disk"))?.size == 1 << 20)
        #expect(FileStatus(folder.path("out")) != nil)
    }

    /// Failed writes do not matter to commands without output or with progress only.
    @Test(arguments: [
        "convert disk out", "convert -p disk out", "convert -p -n -O raw a.qcow2 disk",
        "create -q -f raw out 1M", "resize -q -f raw disk 2M", "dd if=disk of=out bs=512 count=1",
        "check -q a.qcow2", "compare -q a.qcow2 b.qcow2",
    ])
    func silentCommandsSucceed(_ line: String) throws {
        for output in ["> /dev/full", "| true"] {
            let outcome = try shell(
                "set -o pipefail; (sleep 0.1; exec \"$0\" \(line)) \(output)")
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        }
    }

    /// A failed command prints only its own error, not one about the output as well.
    @Test func anErrorIsSaidAlone() throws {
        let outcome = try shell("exec \"$0\" convert --digest missing out > /dev/full")
        #expect(outcome.status == 1, "\(outcome)")
        expectOneErrorLine(outcome, says: "missing")
    }

    /// A verdict that cannot be written is reported as a failure.
    @Test func aVerdictThatIsLostIsAFailure() throws {
        try Qcow2Patcher(folder.path("a.qcow2")).setRefcount(1, 2)
        #expect(try run(Swimg.path, ["check", folder.path("a.qcow2")]).status == 3)
        let check = try shell("exec \"$0\" check a.qcow2 > /dev/full")
        #expect(check.status == 1, "\(check)")
        let compare = try shell("\"$0\" resize -q a.qcow2 9M; exec \"$0\" compare -s a.qcow2 disk")
        #expect(compare.status == 1, "\(compare)")
        let unread = try shell("exec \"$0\" compare -s a.qcow2 disk > /dev/full")
        #expect(unread.status == 2, "\(unread)")
    }

    /// A listing of a million entries stops after its reader closes the pipe.
    @Test(.enabled(if: canTraceSystemCalls, "strace counts the calls"))
    func aLongListStopsEarly() throws {
        let disk = folder.path("long")
        let file = try newFile(disk)
        try file.truncate(atOffset: 2 << 30)
        for start in stride(from: UInt64(0), to: 2 << 30, by: 16384) {
            try file.seek(toOffset: start)
            try file.write(contentsOf: [1])
        }
        try file.close()
        let outcome = try shell(
            "{ strace -f -qq -e trace=lseek -o trace \"$0\" map --output=json long; } "
                + "| head -c 100 > /dev/null; exit ${PIPESTATUS[0]}")
        #expect(outcome.status == 128 + SIGPIPE && outcome.errors.isEmpty, "\(outcome)")
        let calls = try String(contentsOfFile: folder.path("trace"), encoding: .utf8)
        #expect(calls.filter { $0 == "\n" }.count < 100_000)
    }

    /// A non-blocking descriptor also receives the whole output.
    @Test(.enabled(if: hasProgram("python3")))
    func aSlowReaderGetsEverything() throws {
        let script = #"""
            import os, subprocess, sys, time
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            child = subprocess.Popen([sys.argv[1], "map", "--output=json", "many"], stdout=writer)
            os.close(writer)
            time.sleep(0.3)
            text = b"".join(iter(lambda: os.read(reader, 4096), b""))
            print(len(text), child.wait())
            """#
        let file = try newFile(folder.path("many"))
        for start in stride(from: UInt64(0), to: 64 << 20, by: 16384) {
            try file.seek(toOffset: start)
            try file.write(contentsOf: [1])
        }
        try file.close()
        let whole = try require(Swimg.path, ["map", "--output=json", folder.path("many")])
        let said = try require("python3", ["-c", script, Swimg.path], in: folder.path)
        #expect(said == "\(whole.utf8.count) 0\n")
    }
}
