import Foundation
import Glibc
import TestSupport
import Testing

/// CDI, vdsm and Proxmox read progress from a pipe; Incus requests it with SIGUSR1.
@Suite struct ProgressTests {
    let folder: TempFolder

    init() throws { folder = try TempFolder() }

    /// The values of `    (12.34/100%)\r` with one final line break, the form of qemu-img 7.2.
    private func percentages(_ outcome: Outcome) -> [Double] {
        let text = outcome.outputText
        // Unicode scalars, because Swift treats "\r\n" as one character.
        let form = /(?: {4}\([0-9]{1,3}\.[0-9]{2}\/100%\)\r)+\n/.matchingSemantics(.unicodeScalar)
        #expect(text.wholeMatch(of: form) != nil, "\(outcome)")
        return text.matches(of: /\(([0-9.]+)\/100%\)/).compactMap { Double($0.output.1) }
    }

    @Test(arguments: ["-O raw", "-O qcow2", "-c -O qcow2", "-W -O raw", "-m 1 -c -O qcow2"])
    func printsPercentToAPipe(_ options: String) throws {
        try DiskSketch(String(repeating: "A1-b", count: 32)).writeRaw(folder.path("source"))
        let pipe = "\"$0\" convert -p -f raw \(options) source target | cat"
        let outcome = try run("sh", ["-c", pipe, Swimg.path], in: folder.path)
        #expect(outcome.errors.isEmpty, "\(outcome)")
        let numbers = percentages(outcome)
        #expect(numbers.first == 0 && numbers.last == 100, "\(outcome)")
        #expect(numbers == numbers.sorted() && numbers.count > 2, "\(outcome)")
    }

    /// The whole disk is in flight while the server makes its reader wait.
    @Test(.enabled(if: NBDTestServer.isInstalled, "qemu-nbd and nbdkit"))
    func comesWhileTheStorageMakesItWait() throws {
        try writeFilled(folder.path("source"), byte: 7, count: 8 << 20)
        // Two seconds for all requests together; the rate is in bits.
        let server = try NBDTestServer.nbdkit(
            "--filter=rate", "file", folder.path("source"), "rate=32M", "burstiness=0.05")
        let outcome = try Swimg.convert(
            "-p", "-f", "raw", "-O", "raw", server.uri, "target", in: folder.path)
        let numbers = percentages(outcome)
        #expect(numbers.count > 5 && numbers[4] <= 25, "\(outcome)")
    }

    @Test(arguments: ["-O raw", "-O qcow2"])
    func printsPercentForAnEmptyDisk(_ options: String) throws {
        _ = try folder.write("source", [])
        let pipe = "\"$0\" convert -p -f raw \(options) source target | cat"
        let outcome = try run("sh", ["-c", pipe, Swimg.path], in: folder.path)
        let numbers = percentages(outcome)
        #expect(numbers.first == 0 && numbers.last == 100 && outcome.errors.isEmpty, "\(outcome)")
    }

    @Test(arguments: ["-pn", "-np", "-n -p"])
    func bundlesWithoutSpaces(_ options: String) throws {
        try DiskSketch("A-").writeRaw(folder.path("source"))
        try writeFilled(folder.path("target"), byte: 0xaa, count: 131072)
        let line = ["-f", "raw", "-O", "raw"] + options.words
        let outcome = try Swimg.convert(line + ["source", "target"], in: folder.path)
        #expect(percentages(outcome).last == 100, "\(outcome)")
        #expect(
            try mismatch(contents(folder.path("target")), contents(folder.path("source"))) == nil)
    }

    @Test func quietWinsOverProgress() throws {
        try DiskSketch("A-").writeRaw(folder.path("source"))
        for (options, target) in [(["-p", "-q"], "one"), (["-qp"], "other")] {
            expectSuccess(try Swimg.convert(options + ["source", target], in: folder.path))
            let (own, source) = (folder.path(target), folder.path("source"))
            #expect(try mismatch(contents(own), contents(source)) == nil)
        }
    }

    /// A reader that closes the pipe must not leave a partial target that looks complete.
    @Test func survivesOrFailsCleanlyWhenTheReaderLeaves() throws {
        try DiskSketch(String(repeating: "A1-b", count: 32)).writeRaw(folder.path("source"))
        let pipe =
            "{ \"$0\" convert -p -f raw -O raw source target; echo $? > status; } | head -c 5"
        let outcome = try run("sh", ["-c", pipe, Swimg.path], in: folder.path)
        let status = String(decoding: try contents(folder.path("status")), as: UTF8.self)
        if folder.names.contains("target") {
            #expect(
                try mismatch(contents(folder.path("target")), contents(folder.path("source")))
                    == nil)
        } else {
            #expect(status != "0\n", "\(outcome)")
        }
    }

    @Test(arguments: [["-O", "qcow2"], ["-p", "-O", "qcow2"]])
    func reportsOnSignal(_ options: [String]) throws {
        let targets = try folder.makeFolder("targets")
        let source = try LargeDisk.path()
        let running = try Swimg.start(
            ["-c", "-m", "1", "-f", "raw"] + options + [source, targets + "/target"])
        // The signal handler must exist before the source is opened.
        #expect(running.wait(until: { running.hasOpen(source) }))
        for _ in 0..<5 {
            running.send(SIGUSR1)
            usleep(20_000)
        }
        #expect(running.isRunning, "SIGUSR1 must not end the conversion")
        let seen = running.wait(until: { !running.errors.isEmpty || options.contains("-p") })
        running.kill()
        let outcome = try running.wait()
        #expect(seen, "\(outcome)")
        if options.contains("-p") {
            // The progress is already visible, so qemu-img adds nothing on standard error.
            #expect(outcome.errors.isEmpty && !outcome.output.isEmpty, "\(outcome)")
        } else {
            let form = /(?: {4}\([0-9]{1,3}\.[0-9]{2}\/100%\)\n)+/
            #expect(outcome.errorText.wholeMatch(of: form) != nil, "\(outcome)")
            #expect(outcome.output.isEmpty, "\(outcome)")
        }
    }
}
