import Foundation
import TestSupport
import Testing

/// Random images and random conversions, judged by qemu-img.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct RandomTests {
    @Test(arguments: RandomCases.all)
    func convertsLikeQemu(_ number: Int) throws {
        let folder = try TempFolder()
        var maker = RandomImage(seed: UInt64(RandomCases.seed &+ number), folder: folder)
        do {
            try maker.build()
            for _ in 0..<3 {
                let line = maker.conversion()
                let outcome = try Swimg.convert(
                    line.words, in: folder.path)
                maker.log.append("swimg convert \(line)")
                #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(maker.story)\n\(outcome)")
                let format = line.contains("-O qcow2") ? "qcow2" : "raw"
                let difference = try Qemu.difference(
                    folder.path("target"), format, folder.path(maker.top), maker.format)
                #expect(difference == nil, "\(maker.story)")
                let damage = try format == "qcow2" ? Qemu.damage(folder.path("target")) : nil
                #expect(damage == nil, "\(maker.story)")
            }
        } catch {
            Issue.record("\(error)\n\(maker.story)")
        }
    }
}
