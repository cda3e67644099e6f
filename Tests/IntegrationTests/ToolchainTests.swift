import Foundation
import TestSupport
import Testing

/// The Makefile's search for the compiler on machines with other programs named swift.
@Suite(.enabled(if: hasProgram("swift"), "the compiler is in PATH as a rule")) struct ToolchainTests
{
    private static let script = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
        .appendingPathComponent("../../Scripts/toolchain.sh").standardizedFileURL.path

    private let folder: TempFolder

    /// OpenStack's swift client is first in PATH.
    init() throws {
        folder = try TempFolder()
        let client =
            "#!/bin/sh\n[ \"$1\" = --version ] && echo python-swiftclient 4.1.0 || exit 2\n"
        let path = try folder.write("swift", Array(client.utf8))
        try require("chmod", ["+x", path])
    }

    private func toolchain(_ words: [String], path: String) throws -> Outcome {
        try run("env", ["PATH=\(folder.path):\(path)", Self.script] + words)
    }

    @Test func findsTheCompilerBehindAnother() throws {
        let path = ProcessInfo.processInfo.environment["PATH"] ?? ""
        let swift = try toolchain(["swift", "--version"], path: path)
        #expect(swift.isSuccess && swift.outputText.contains("Swift version"), "\(swift)")
    }

    @Test func saysInALineWhatItFound() throws {
        // PATH contains only the programs that the script itself calls.
        let tools = try folder.makeFolder("tools")
        for name in ["bash", "env", "sh", "dirname", "realpath"] {
            let place = try require("which", [name]).trimmingCharacters(in: .whitespacesAndNewlines)
            try FileManager.default.createSymbolicLink(
                atPath: "\(tools)/\(name)", withDestinationPath: place)
        }
        let outcome = try toolchain(["swift", "--version"], path: tools)
        #expect(outcome.status == 1 && outcome.output.isEmpty, "\(outcome)")
        #expect(outcome.errorText.filter { $0 == "\n" }.count == 1, "\(outcome)")
        #expect(
            outcome.errorText.contains("not the compiler: \(folder.path("swift"))"), "\(outcome)")
    }
}
