import Foundation
import TestSupport
import Testing

/// Images with changes to meaningful fields. Whatever they contain, there must be no signal, no
/// hang, one line for a failure and no wrong byte, and no verb that writes in place may worsen an
/// image.
///
/// `SWIMG_MUTATIONS` in the environment sets the number of mutations and `SWIMG_SEED` the first
/// seed; `make fuzz-images COUNT=20000 SEED=1` runs only this test.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct MutationTests {
    static let count = number("SWIMG_MUTATIONS") ?? 30
    static let seed = number("SWIMG_SEED") ?? 20_251_127
    /// Each case mutates its share of the images, in parallel with the others.
    static let cases = Array(0..<min(8, max(1, count)))

    private static func number(_ name: String) -> Int? {
        ProcessInfo.processInfo.environment[name].flatMap { Int($0) }
    }

    @Test(arguments: cases)
    func nothingGetsWorse(_ number: Int) throws {
        let images = try MutationImage.all.get()
        for index in stride(from: number, to: Self.count, by: Self.cases.count) {
            let seed = Self.seed &+ index
            var trial = try MutationTrial(seed: UInt64(bitPattern: Int64(seed)), images: images)
            do {
                try trial.run()
            } catch {
                // A program that hangs, or a failure of the harness.
                trial.complain("\(error)")
            }
            for complaint in trial.complaints {
                Issue.record("\(complaint)\n\(trial.story)")
            }
        }
    }
}
