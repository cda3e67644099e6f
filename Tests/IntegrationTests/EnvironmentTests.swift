import Foundation
import Glibc
import TestSupport
import Testing

/// A process that was started oddly: closed descriptors, no /proc, an environment that has moved.
@Suite struct EnvironmentTests {
    let folder: TempFolder
    let sketch = DiskSketch("A1-b0+-C")

    init() throws {
        folder = try TempFolder()
        try sketch.writeRaw(folder.path("source"))
    }

    private func start(_ words: String..., closing: [Int32]) throws -> Outcome {
        try RunningProcess(Swimg.path, words, in: folder.path, closed: closing).wait()
    }

    private static let closings: [[Int32]] = [[0], [1], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2]]

    /// An image that got the number of a standard stream would have messages written into it.
    @Test(arguments: closings)
    func messagesGoIntoNoImage(_ closed: [Int32]) throws {
        let bytes = sketch.bytes
        let target = try start("convert", "-p", "-O", "raw", "source", "target", closing: closed)
        #expect(target.status == 0, "\(target)")
        #expect(try mismatch(contents(folder.path("target")), bytes) == nil, "\(closed)")
        let again = try start(
            "convert", "-n", "-p", "-O", "raw", "source", "target", closing: closed)
        #expect(again.status == 0, "\(again)")
        #expect(try mismatch(contents(folder.path("target")), bytes) == nil, "\(closed)")
        // The format is guessed, which brings a warning.
        let resized = try start("resize", "target", "+1M", closing: closed)
        #expect(resized.status == 0, "\(resized)")
        let grown = try contents(folder.path("target"))
        #expect(mismatch(grown.prefix(bytes.count), bytes) == nil, "\(closed)")
        #expect(try mismatch(contents(folder.path("source")), bytes) == nil, "\(closed)")
    }

    @Test(arguments: closings)
    func repairsGoOn(_ closed: [Int32]) throws {
        expectSuccess(try Swimg.convert("-O", "qcow2", "source", "image", in: folder.path))
        let before = try contents(folder.path("image"))
        for words in [["-r", "leaks"], ["-r", "all"], ["--output=json"]] {
            let line = ["check"] + words + ["image"]
            let outcome = try RunningProcess(
                Swimg.path, line, in: folder.path, closed: closed
            ).wait()
            #expect(outcome.status == 0, "\(outcome)")
            #expect(try mismatch(contents(folder.path("image")), before) == nil, "\(closed)")
        }
    }

    @Test(arguments: [[1], [2], [0, 1, 2]] as [[Int32]])
    func failuresAreStillTold(_ closed: [Int32]) throws {
        let outcome = try start("convert", "missing", "target", closing: closed)
        #expect(outcome.status == 1 && folder.names == ["source"], "\(outcome)")
    }

    @Test(.enabled(if: isRoot && hasProgram("unshare"), "mounting over /proc needs root"))
    func worksWithoutProc() throws {
        let script = """
            mount -t tmpfs none /proc || exit 77
            "$0" info source > info && "$0" convert -p source target > progress \
            && "$0" convert -O qcow2 source target && "$0" convert -t writeback target target2 \
            && "$0" digest target
            """
        let outcome = try run(
            "unshare", ["-m", "sh", "-c", script, Swimg.path], in: folder.path)
        #expect(outcome.status == 0 && outcome.errors.isEmpty, "\(outcome)")
        #expect(outcome.outputText.hasSuffix("  target\n"), "\(outcome)")
        #expect(try mismatch(contents(folder.path("target2")), sketch.bytes) == nil)
        #expect(folder.names == ["info", "progress", "source", "target", "target2"])
    }

    @Test(.enabled(if: Preload.isUsable, "needs a C compiler"), arguments: ["setenv", "clearenv"])
    func libraryThatChangesTheEnvironment(_ what: String) throws {
        let body =
            what == "clearenv"
            ? "clearenv();"
            : "for (char c = 'A'; c <= 'Z'; c++) { char n[] = {c, c, 0}; setenv(n, n, 1); }"
        let library = try Preload(
            """
            #define _GNU_SOURCE
            #include <stdlib.h>
            __attribute__((constructor)) static void begin(void) { \(body) }
            """)
        let outcome = try run(
            Swimg.path, ["convert", "-O", "raw", "source", "target"], in: folder.path,
            environment: library.environment)
        expectSuccess(outcome)
        #expect(try mismatch(contents(folder.path("target")), sketch.bytes) == nil)
        guard hasProgram("nbdkit") else { return }
        let served = try run(
            Swimg.path, ["convert", "[", "nbdkit", "file", "source", "]", "target2"],
            in: folder.path, environment: library.environment)
        #expect(served.status == 0, "\(served)")
    }

    @Test(
        .enabled(if: hasProgram("nbdkit"), "needs nbdkit"),
        arguments: ["", "/nonexistent", String(repeating: "x", count: 100), "source"])
    func socketsGoToAnotherFolder(_ folderName: String) throws {
        if folderName.hasPrefix("x") { _ = try folder.makeFolder(folderName) }
        let outcome = try run(
            Swimg.path, ["convert", "[", "nbdkit", "file", "source", "]", "target"],
            in: folder.path,
            environment: [
                "TMPDIR": folderName.isEmpty || folderName.hasPrefix("/")
                    ? folderName : folder.path(folderName)
            ])
        expectSuccess(outcome)
        #expect(try mismatch(contents(folder.path("target")), sketch.bytes) == nil)
    }
}
