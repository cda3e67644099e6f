import Foundation
import TestSupport
import Testing

/// A few of the random sequences and conversions of `make sequences` and `make conversions`.
///
/// `SWIMG_SEED` in the environment sets the first seed.
@Suite(
    .enabled(
        if: Qemu.isInstalled && hasProgram("python3") && hasProgram("nbdinfo"),
        "the judges are qemu-img and nbdinfo, the script is Python"))
struct SequenceTests {
    private static let script = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
        .appendingPathComponent("../../Scripts/sequences.py").standardized.path

    @Test(arguments: ["--count 6", "--conversions --count 2"])
    func holdWhatTheirModelHolds(_ words: String) throws {
        let line = [Self.script, Swimg.path, "--seed", "\(RandomCases.seed)"] + words.words
        let outcome = try run(
            "python3", line, environment: ["PYTHONDONTWRITEBYTECODE": "1"], timeout: 300)
        #expect(outcome.isSuccess, "\(outcome.outputText)\n\(outcome.errorText)")
    }
}
