import Foundation
import TestSupport
import Testing

/// Images that were changed at places which mean something. Whatever they hold: no signal, no hang,
/// one line at a failure, no wrong byte, and a verb that writes in place makes nothing worse.
///
/// `SWIMG_MUTATIONS` in the environment is how many there are, `SWIMG_SEED` where they begin;
/// `make fuzz-images COUNT=20000 SEED=1` runs nothing else.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct MutationTests {
    static let count = number("SWIMG_MUTATIONS") ?? 200
    static let seed = number("SWIMG_SEED") ?? 20_251_127
    /// Each case has its part of the images, and runs beside the others.
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
                // A program that hangs, or a harness that fails.
                trial.complain("\(error)")
            }
            for complaint in trial.complaints {
                Issue.record("\(complaint)\n\(trial.story)")
            }
        }
    }
}
