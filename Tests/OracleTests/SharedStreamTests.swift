import Foundation
import TestSupport
import Testing

/// Neighbouring clusters whose entries name one compressed stream, which tables may do and qemu-img
/// reads.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct SharedStreamTests {
    private let folder: TempFolder

    init() throws {
        folder = try TempFolder()
        // A different word every 64 bytes, so that misplaced parts of a cluster are detected.
        let bytes = (0..<256 << 10).map { UInt8(truncatingIfNeeded: $0 % 64 == 0 ? $0 >> 6 : 7) }
        _ = try folder.write("disk", bytes)
    }

    /// Makes the first `count` L2 entries equal.
    private func makeImage(_ options: String, sharing count: Int) throws {
        try Qemu.img(
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "disk", "image",
            in: folder.path)
        let patcher = try Qcow2Patcher(folder.path("image"))
        for index in 1..<count {
            try patcher.setWord(patcher.l2Entry(index), patcher.word(patcher.l2Entry(0)))
        }
        try Qemu.img("check", "-q", "-r", "all", "image", in: folder.path)
    }

    @Test(arguments: [
        "cluster_size=64k", "cluster_size=4k", "cluster_size=512",
        "cluster_size=64k,compression_type=zstd", "cluster_size=64k,extended_l2=on",
    ])
    func readsEachCluster(_ options: String) throws {
        try makeImage(options, sharing: 4)
        let outcome = try Swimg.convert("-f", "qcow2", "image", "target", in: folder.path)
        try judge(
            outcome, folder.path("target"), "raw", against: folder.path("image"), "qcow2")
        let digest = try run(Swimg.path, ["digest", "image"], in: folder.path)
        #expect(digest.outputText.hasPrefix(try blkhash(folder.path("target"))), "\(digest)")
        let compared = try run(Swimg.path, ["compare", "image", "target"], in: folder.path)
        #expect(compared.isSuccess, "\(compared)")
    }

    @Test(arguments: ["bs=2048 skip=1 count=3", "bs=1000 skip=3 count=9", "bs=512 skip=7 count=2"])
    func readsPartsOfThem(_ slice: String) throws {
        try makeImage("cluster_size=4k", sharing: 2)
        for (program, target) in [("qemu-img", "theirs"), (Swimg.path, "ours")] {
            let words = ["dd", "-f", "qcow2", "-O", "raw", "if=image", "of=\(target)"]
            let outcome = try run(program, words + slice.words, in: folder.path)
            #expect(outcome.isSuccess, "\(outcome)")
        }
        let difference = try mismatch(
            contents(folder.path("ours")), contents(folder.path("theirs")))
        #expect(difference == nil)
    }

    /// An overlay with smaller clusters reads parts of the base's clusters.
    @Test func anOverlayReadsPartsOfThem() throws {
        try makeImage("cluster_size=4k", sharing: 2)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", "image", "-F", "qcow2",
            "overlay", in: folder.path)
        try Qemu.io("qcow2", folder.path("overlay"), ["write -P 1 0 1k", "write -P 2 5k 3k"])
        let outcome = try Swimg.convert("-f", "qcow2", "overlay", "target", in: folder.path)
        try judge(
            outcome, folder.path("target"), "raw", against: folder.path("overlay"), "qcow2")
    }
}
