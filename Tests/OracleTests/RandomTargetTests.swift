import Foundation
import TestSupport
import Testing

/// Random images over random backing files and into existing targets, judged by qemu-img.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct RandomTargetTests {
    static let cases = Array(RandomCases.all.prefix(max(1, RandomCases.all.count / 2)))

    /// A source without a backing file is the whole disk, whatever backing file the target has.
    @Test(arguments: cases)
    func hidesTheBackingFile(_ number: Int) throws {
        let seed = UInt64(RandomCases.seed &+ number)
        let folder = try TempFolder()
        let baseFolder = try TempFolder()
        var random = SplitMix64(seed: seed &+ 1 << 40)
        var maker = RandomImage(seed: seed, folder: folder)
        var base = RandomImage(seed: seed &+ 1 << 20, folder: baseFolder)
        try maker.build(depths: [1])
        try base.build()
        let source = folder.path(maker.top)
        let backing = ["-B", baseFolder.path(base.top), "-F", base.format]
        for _ in 0..<3 {
            var line = ["-f", maker.format, "-O", "qcow2", "-m", "\(random.pick([1, 3, 8]))"]
            if random.once(in: 2) { line.append("-W") }
            if random.once(in: 4) { line += ["-S", random.pick(["0", "512", "64k"])] }
            let target = folder.path("target")
            try? FileManager.default.removeItem(atPath: target)
            if random.once(in: 3), base.size >= maker.size {
                // An overlay that already contains data.
                try Qemu.img(
                    "create", "-q", "-f", "qcow2", "-b", baseFolder.path(base.top), "-F",
                    base.format, target)
                try Qemu.io("qcow2", target, ["write -P 0xaa 0 \(1 + random.below(base.size))"])
                line.append("-n")
            } else {
                let cluster = 512 << random.below(9)
                let version2 = random.once(in: 3)
                line += ["-o", "cluster_size=\(cluster)"]
                if version2 { line += ["-o", "compat=0.10"] }
                if !version2, cluster >= 16384, random.once(in: 2) {
                    line += ["-o", "extended_l2=on"]
                }
                if random.once(in: 3) { line.append("-c") }
            }
            let outcome = try Swimg.convert(line + backing + [source, target])
            let story = "\(outcome)\n\(maker.story)\nand the base:\n\(base.story)"
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(story)")
            #expect(try Qemu.damage(target) == nil, "\(story)")
            // With -n the target may be longer than the source: its tail stays.
            try Qemu.img("convert", "-f", maker.format, "-O", "raw", source, folder.path("disk"))
            try Qemu.img("convert", "-f", "qcow2", "-O", "raw", target, folder.path("result"))
            let disk = try contents(folder.path("disk"))
            #expect(
                try mismatch(contents(folder.path("result")).prefix(disk.count), disk) == nil,
                "\(story)")
        }
    }

    /// A raw target that ends anywhere within the source's last sector.
    @Test(arguments: cases)
    func endsWithinTheLastSector(_ number: Int) throws {
        let seed = UInt64(RandomCases.seed &+ number)
        let folder = try TempFolder()
        var random = SplitMix64(seed: seed &+ 1 << 41)
        var maker = RandomImage(seed: seed, folder: folder)
        try maker.build()
        let source = folder.path(maker.top)
        try Qemu.img("convert", "-f", maker.format, "-O", "raw", source, folder.path("disk"))
        let disk = try contents(folder.path("disk"))
        for _ in 0..<3 {
            let size = disk.count - random.below(512)
            let target = folder.path("target")
            try writeFilled(target, byte: 0xaa, count: size)
            var line = ["-n", "-f", maker.format, "-O", "raw", "-m", "\(random.pick([1, 8]))"]
            if random.once(in: 2) { line.append("-W") }
            if random.once(in: 3) { line += ["-S", random.pick(["0", "512", "64k"])] }
            if random.once(in: 4) { line += ["-t", "none"] }
            let outcome = try Swimg.convert(line + [source, target])
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)\n\(maker.story)")
            let written = try contents(target)
            let grows = disk.dropFirst(size).contains { $0 != 0 }
            #expect(written.count == (grows ? disk.count : size), "\(outcome)\n\(maker.story)")
            #expect(
                mismatch(written, disk.prefix(written.count)) == nil,
                "\(outcome)\n\(maker.story)")
        }
    }
}
