import Foundation
import Glibc
import TestSupport
import Testing

/// Random images under names of random bytes: qemu-img, using plain names, verifies that the named
/// files are read and written.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct RandomNameTests {
    @Test(arguments: RandomCases.all.prefix(20))
    func namesAreBytes(_ number: Int) throws {
        let folder = try TempFolder()
        let seed = UInt64(RandomCases.seed &+ number) ^ 0xb17e5
        var random = SplitMix64(seed: seed)
        var maker = RandomImage(seed: seed, folder: folder)
        try maker.build()
        let (source, target) = (Self.name(&random), Self.name(&random))
        let folderName = Self.name(&random)
        func move(_ one: [UInt8], _ other: [UInt8]) throws {
            let moved = try run("mv", bytes: [Array("-T".utf8), one, other], in: folder.path)
            try #require(moved.isSuccess, "\(moved)")
        }
        try move(Array(maker.top.utf8), source)
        try #require(run("mkdir", bytes: [folderName], in: folder.path).isSuccess)
        let place = folderName + Array("/".utf8) + target
        for format in ["raw", "qcow2", "raw"] {
            let words = ["convert", "-f", maker.format, "-O", format].map { Array($0.utf8) }
            let outcome = try run(Swimg.path, bytes: words + [source, place], in: folder.path)
            let story = "\(maker.story)\n\(source) to \(place)\n\(outcome)"
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(story)")
            // An overlay names its base by the same bytes.
            let overlay = try run(
                Swimg.path,
                bytes: ["create", "-q", "-f", "qcow2", "-F", format, "-b"].map { Array($0.utf8) }
                    + [place, Array("overlay".utf8)], in: folder.path)
            #expect(overlay.isSuccess, "\(story)\n\(overlay)")
            try move(source, Array(maker.top.utf8))
            for (image, kind) in [("overlay", "qcow2")] {
                let difference = try Qemu.difference(
                    folder.path(image), kind, folder.path(maker.top), maker.format)
                #expect(difference == nil, "\(story)")
            }
            try move(Array(maker.top.utf8), source)
        }
    }

    /// 1 to 40 bytes, most above 0x7f, without slash, NUL and leading bytes with a special meaning.
    private static func name(_ random: inout SplitMix64) -> [UInt8] {
        var name: [UInt8] = []
        for _ in 0...random.below(40) {
            name.append(
                random.once(in: 6)
                    ? random.pick(Array("az=, \"'\\%?*".utf8)) : UInt8(0x80 + random.below(0x80)))
        }
        return [UInt8(ascii: "x")] + name
    }
}
