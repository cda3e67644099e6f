import Foundation
import TestSupport
import Testing

/// Block devices filled with 0xAA, so that a missing zero is detected.
@Suite(.enabled(if: Qemu.isInstalled && LoopDevice.isUsable, "loop devices need root"))
struct DeviceTests {
    static let deviceSize = 4 << 20

    struct Case: Sendable, CustomStringConvertible {
        let sector: Int
        let options: String

        var description: String { "sectors of \(sector), \(options)" }
    }

    static let cases: [Case] = [512, 4096].flatMap { sector in
        [
            "-O raw", "-n -O raw", "-W -n -O raw", "-n -O raw -t none", "-O raw -t none -W",
            "-n -O raw -S 0", "-n -O raw -t directsync", "-n -O raw -S 64k -t writeback -m 1",
        ].map { Case(sector: sector, options: $0) }
    }

    static let sources = ["raw-sparse", "zeros-written", "zstd-64k", "chain-deep", "extended-16k"]

    @Test(arguments: some(of: cases, with: sources))
    func rawOnADevice(_ device: Case, _ name: String) throws {
        let loop = try LoopDevice(
            size: Self.deviceSize, sectorSize: device.sector, fill: 0xaa)
        let source = try SourceGallery.named(name)
        let outcome = try Swimg.convert(
            device.options.words + ["-f", source.format]
                + [source.path, loop.path])
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        let size = SourceGallery.content.count
        let bytes = try contents(loop.path, at: 0, count: Self.deviceSize)
        #expect(mismatch(bytes.prefix(size), SourceGallery.content) == nil, "\(outcome)")
        #expect(bytes.dropFirst(size).allSatisfy { $0 == 0xaa }, "the tail changed: \(outcome)")
    }

    /// `--target-is-zero` is trusted: 0xAA bytes under the source's zeros stay.
    @Test(arguments: [512, 4096])
    func targetIsZeroIsBelieved(_ sector: Int) throws {
        let loop = try LoopDevice(size: Self.deviceSize, sectorSize: sector, fill: 0xaa)
        let folder = try TempFolder()
        let sketch = DiskSketch("A--1-0B-")
        try sketch.writeQcow2(folder.path("source"))
        let outcome = try Swimg.convert(
            "-n", "--target-is-zero", "-f", "qcow2", "-O", "raw", folder.path("source"), loop.path)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        let bytes = try contents(loop.path, at: 0, count: sketch.size)
        for (index, letter) in sketch.letters.enumerated() {
            let range = index * sketch.cluster..<(index + 1) * sketch.cluster
            if "-0".contains(letter) {
                #expect(bytes[range].allSatisfy { $0 == 0xaa }, "cluster \(index): \(outcome)")
            } else {
                #expect(
                    mismatch(bytes[range], sketch.bytes[range]) == nil,
                    "cluster \(index): \(outcome)")
            }
        }
    }

    @Test(arguments: [
        Case(sector: 512, options: "-O qcow2"), Case(sector: 4096, options: "-O qcow2"),
        Case(sector: 512, options: "-O qcow2 -o cluster_size=512 -W"),
        Case(sector: 4096, options: "-O qcow2 -o cluster_size=512 -t none"),
        Case(sector: 4096, options: "-O qcow2 -o cluster_size=4k -t none -W"),
        Case(sector: 512, options: "-c -O qcow2 -t none"),
        Case(sector: 4096, options: "-c -O qcow2"),
        Case(sector: 4096, options: "-c -O qcow2 -t none"),
        Case(sector: 4096, options: "-c -O qcow2 -o cluster_size=512 -t none"),
        Case(
            sector: 4096,
            options: "-c -O qcow2 -o compression_type=zstd,cluster_size=4k -t directsync"),
    ])
    func qcow2OnADevice(_ device: Case) throws {
        let loop = try LoopDevice(size: Self.deviceSize, sectorSize: device.sector, fill: 0xaa)
        for name in ["raw-sparse", "zeros-written", "chain-deep"] {
            let source = try SourceGallery.named(name)
            let outcome = try Swimg.convert(
                device.options.words + ["-f", source.format]
                    + [source.path, loop.path])
            try judge(outcome, loop.path, "qcow2", against: SourceGallery.reference)
        }
    }

    @Test(arguments: ["-O raw", "-n -O raw", "-O qcow2", "-O qcow2 -m 1"])
    func tooSmallADeviceIsRefused(_ options: String) throws {
        let loop = try LoopDevice(size: 1 << 20, sectorSize: 512, fill: 0xaa)
        let folder = try TempFolder()
        try writeNoise(folder.path("source"), count: 3 << 20)
        let outcome = try Swimg.convert(
            options.words + ["-f", "raw"]
                + [folder.path("source"), loop.path])
        #expect(outcome.status == 1, "\(outcome)")
        #expect(
            outcome.errorText.hasPrefix(Swimg.prefix) && outcome.errorText.hasSuffix("\n")
                && outcome.errorText.filter { $0 == "\n" }.count == 1, "\(outcome)")
        #expect(outcome.errorText.contains(loop.path), "\(outcome)")
    }

    @Test(arguments: ["-T none", "-T directsync", "-T writeback", "-T none -m 1"], [512, 4096])
    func readsFromADevice(_ options: String, _ sector: Int) throws {
        let folder = try TempFolder()
        let image = try SourceGallery.named("extended-16k")
        for (format, path) in [("raw", SourceGallery.reference), ("qcow2", image.path)] {
            let disk = folder.path("disk")
            try FileManager.default.copyItem(atPath: path, toPath: disk)
            // A device has whole sectors, so the disk in it ends earlier.
            let whole = Int64((try contents(disk).count + 4095) / 4096 * 4096)
            try FileHandle(forWritingTo: URL(fileURLWithPath: disk))
                .truncate(atOffset: UInt64(whole))
            let loop = try LoopDevice(over: disk, sectorSize: sector)
            let outcome = try Swimg.convert(
                options.words + ["-f", format, "-O", "qcow2"]
                    + [loop.path, folder.path("target")])
            let reference = format == "raw" ? disk : SourceGallery.reference
            try judge(outcome, folder.path("target"), "qcow2", against: reference)
            try FileManager.default.removeItem(atPath: disk)
        }
    }
}
