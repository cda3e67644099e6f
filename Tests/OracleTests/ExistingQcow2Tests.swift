import Foundation
import TestSupport
import Testing

/// `-n` into an existing qcow2 image, which keeps its options and its tail.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct ExistingQcow2Tests {
    private func convert(_ name: String, _ mode: String, _ rest: String...) throws -> Outcome {
        let source = try SourceGallery.named(name)
        return try Swimg.convert(
            mode.words + ["-n", "-f", source.format] + rest.dropLast()
                + [source.path, rest.last ?? ""])
    }

    static let qcow2Options = [
        "", "compat=0.10", "cluster_size=512", "cluster_size=4k", "cluster_size=2M",
        "lazy_refcounts=on", "compression_type=zstd", "preallocation=metadata",
        "preallocation=falloc,cluster_size=4k", "compat=0.10,cluster_size=2M",
        "refcount_bits=1", "refcount_bits=64,cluster_size=1k", "extended_l2=on",
        "extended_l2=on,cluster_size=16k,preallocation=metadata",
    ]

    @Test(arguments: some(of: qcow2Options, with: ["", "-W", "-m 1 -S 64k", "-t none"]))
    func freshQcow2(_ options: String, _ mode: String) throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        try create(target, options)
        let before = try Qcow2Fields(target)
        let outcome = try convert("chain-deep", mode, "-O", "qcow2", target)
        try judge(outcome, target, "qcow2", against: SourceGallery.reference)
        let after = try Qcow2Fields(target)
        #expect(after.version == before.version && after.clusterBits == before.clusterBits)
        #expect(after.compressionType == before.compressionType)
        #expect(after.compatibleFeatures == before.compatibleFeatures)
    }

    /// Old data must not show through where the source has zeros.
    @Test(arguments: qcow2Options, ["", "-W -m 3"])
    func filledQcow2(_ options: String, _ mode: String) throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        try create(target, options)
        try Qemu.io("qcow2", target, ["write -P 0xaa 0 1200k"])
        let outcome = try convert("zeros-written", mode, "-O", "qcow2", target)
        try judge(outcome, target, "qcow2", against: SourceGallery.reference)
    }

    @Test(arguments: qcow2Options, ["", "-W -m 3"])
    func compressedIntoFilledQcow2(_ options: String, _ mode: String) throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        try create(target, options)
        try Qemu.io("qcow2", target, ["write -P 0xaa 0 600k"])
        // qemu-io compresses only what is not allocated yet.
        if !["extended_l2", "2M", "preallocation"].contains(where: options.contains) {
            try Qemu.io("qcow2", target, ["write -c -P 0xbb 640k 128k"])
        }
        let outcome = try convert("v3-4k", mode + " -c", "-O", "qcow2", target)
        try judge(outcome, target, "qcow2", against: SourceGallery.reference)
    }

    @Test func aCorruptImageIsRefusedUntouched() throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        try create(target, "")
        try Qcow2Patcher(target).change(72) { $0 ^ 2 }
        try expectRefusedUntouched(target, "corrupt")
    }

    /// Features and header extensions of later versions stay.
    @Test(
        arguments: [
            (80, 1 << 40),
            // The type of the first header extension.
            (112, 1 << 33),
        ] as [(offset: Int, bit: UInt64)])
    func unknownPartsAreKept(_ offset: Int, _ bit: UInt64) throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        try create(target, "")
        try Qcow2Patcher(target).change(offset) { $0 ^ bit }
        let before = try contents(target)[offset..<offset + 8]
        let outcome = try convert("chain-deep", "", "-O", "qcow2", target)
        try judge(outcome, target, "qcow2", against: SourceGallery.reference)
        #expect(try contents(target)[offset..<offset + 8] == before)
    }

    @Test(arguments: ["", "compat=0.10", "cluster_size=4k", "extended_l2=on"], ["", "-c -W"])
    func snapshotsAreKept(_ options: String, _ mode: String) throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        try create(target, options)
        try Qemu.io("qcow2", target, ["write -P 0xaa 0 1200k"])
        let kept = folder.path("kept.raw")
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", target, kept)
        try Qemu.img("snapshot", "-c", "old", target)
        let outcome = try convert("chain-deep", mode, "-O", "qcow2", target)
        try judge(outcome, target, "qcow2", against: SourceGallery.reference)
        let snapshot = folder.path("snapshot.raw")
        try Qemu.img("convert", "-l", "old", "-f", "qcow2", "-O", "raw", target, snapshot)
        try require("cmp", [kept, snapshot])
        // Clusters of the snapshot alone are free once it is gone.
        try Qemu.img("snapshot", "-d", "old", target)
        #expect(try Qemu.damage(target) == nil)
    }

    /// A bitmap that is enabled has recorded every write, another one none.
    @Test func bitmapsRecordWhatIsWritten() throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        try Qemu.img("create", "-q", "-f", "qcow2", target, "4M")
        try Qemu.img("bitmap", "--add", target, "enabled")
        try Qemu.img("bitmap", "--add", "--disable", target, "disabled")
        try Qemu.io("qcow2", target, ["write -P 0xaa 3M 64k"])
        let outcome = try convert("v3-4k", "-W", "-O", "qcow2", target)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try Qemu.damage(target) == nil)
        let written = Int64((SourceGallery.content.count + 65535) / 65536 * 65536)
        #expect(
            try Qemu.bitmap("enabled", of: target) == [0..<written, 3 << 20..<3 << 20 + 65536])
        #expect(try Qemu.bitmap("disabled", of: target).isEmpty)
    }

    @Test func smallerQcow2IsRefusedUntouched() throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        try Qemu.img("create", "-q", "-f", "qcow2", target, "1M")
        try expectRefusedUntouched(target, "smaller")
    }

    @Test func rawTargetIsNotTakenForQcow2() throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        try writeFilled(target, byte: 0xaa, count: 2 << 20)
        try expectRefusedUntouched(target, "qcow2")
    }

    private func expectRefusedUntouched(_ target: String, _ says: String) throws {
        let before = try contents(target)
        for mode in ["", "-W", "-t none"] {
            let outcome = try convert("chain-deep", mode, "-O", "qcow2", target)
            #expect(outcome.status == 1 && outcome.errorText.contains(says), "\(outcome)")
            #expect(try mismatch(contents(target), before) == nil, "\(outcome)")
        }
    }

    @Test(arguments: ["", "-W"])
    func tailOfALargerQcow2Stays(_ mode: String) throws {
        let folder = try TempFolder()
        let target = folder.path("target")
        try Qemu.img("create", "-q", "-f", "qcow2", target, "2M")
        try Qemu.io("qcow2", target, ["write -P 0xaa 0 2M"])
        let outcome = try convert("v3-4k", mode, "-O", "qcow2", target)
        let expected =
            SourceGallery.content
            + [UInt8](repeating: 0xaa, count: (2 << 20) - SourceGallery.content.count)
        try judge(outcome, target, "qcow2", against: folder.write("expected", expected))
    }

    private func create(_ target: String, _ options: String) throws {
        let words = options.isEmpty ? [] : ["-o", options]
        try require(
            "qemu-img",
            ["create", "-q", "-f", "qcow2"] + words + [target, "\(SourceGallery.content.count)"])
    }
}
