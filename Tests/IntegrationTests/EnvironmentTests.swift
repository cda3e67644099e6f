import Foundation
import Glibc
import TestSupport
import Testing

/// Unusual process environments: closed descriptors, no /proc, relocated environment variables.
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

    /// An image with the descriptor number of a standard stream would receive the messages.
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
        // resize guesses the format, which prints a warning.
        let resized = try start("resize", "target", "+1M", closing: closed)
        #expect(resized.status == 0, "\(resized)")
        let grown = try contents(folder.path("target"))
        #expect(mismatch(grown.prefix(bytes.count), bytes) == nil, "\(closed)")
        #expect(try mismatch(contents(folder.path("source")), bytes) == nil, "\(closed)")
    }

    /// A repair prints messages while the image is open.
    @Test(arguments: closings)
    func repairsGoOn(_ closed: [Int32]) throws {
        expectSuccess(try Swimg.convert("-O", "qcow2", "source", "image", in: folder.path))
        let sound = try contents(folder.path("image"))
        // Leaks a cluster at the end of the file: it is counted but not used. The first refcount
        // block is cluster 1.
        let image = FileHandle(forUpdatingAtPath: folder.path("image"))
        try image?.truncate(atOffset: UInt64(sound.count.roundedUp(to: 65536) + 65536))
        try image?.seek(toOffset: UInt64(65536 + 2 * sound.count.roundedUp(to: 65536) / 65536))
        try image?.write(contentsOf: Data([0, 1]))
        try image?.close()
        let outcome = try start("check", "-r", "leaks", "image", closing: closed)
        #expect(outcome.status == 0, "\(outcome)")
        let repaired = try contents(folder.path("image"))
        #expect(mismatch(repaired.prefix(sound.count), sound) == nil, "\(closed)")
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
        // swimg must run directly: the library would also change the environment of a shell.
        let names = (folder.path("source"), folder.path("target"), folder.path("target2"))
        let outcome = try run(
            Swimg.path, ["convert", "-O", "raw", names.0, names.1],
            environment: library.environment)
        expectSuccess(outcome)
        #expect(try mismatch(contents(folder.path("target")), sketch.bytes) == nil)
        guard hasProgram("nbdkit") else { return }
        let served = try run(
            Swimg.path, ["convert", "[", "nbdkit", "file", names.0, "]", names.2],
            environment: library.environment)
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

extension Int {
    fileprivate func roundedUp(to unit: Int) -> Int { (self + unit - 1) / unit * unit }
}
