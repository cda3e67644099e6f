import Foundation
import TestSupport
import Testing

/// A target format with its options.
struct TargetFormat: Sendable, CustomStringConvertible {
    let line: String

    var format: String { line.contains("qcow2") ? "qcow2" : "raw" }
    var options: [String] { line.words }
    var description: String { line }

    static let plain = [
        "-O raw", "-O qcow2", "-O qcow2 -o compat=0.10", "-O qcow2 -o compat=0.10,cluster_size=512",
        "-O qcow2 -o compat=0.10,cluster_size=4k", "-O qcow2 -o compat=0.10,cluster_size=2M",
        "-O qcow2 -o cluster_size=512", "-O qcow2 -o cluster_size=1k",
        "-O qcow2 -o cluster_size=4k",
        "-O qcow2 -o cluster_size=2M", "-O qcow2 -o extended_l2=on",
        "-O qcow2 -o extended_l2=on,cluster_size=2M",
    ].map(TargetFormat.init(line:))

    static let compressed = [
        "-c -O qcow2", "-c -O qcow2 -o compat=0.10", "-c -O qcow2 -o cluster_size=512",
        "-c -O qcow2 -o cluster_size=4k", "-c -O qcow2 -o cluster_size=2M",
        "-c -O qcow2 -o compression_type=zstd", "-c -O qcow2 -o compression_level=1",
        "-c -O qcow2 -o compression_type=zstd,compression_level=9",
        "-c -O qcow2 -o compression_type=zstd,cluster_size=4k",
        "-c -O qcow2 -o compression_type=zstd,cluster_size=2M",
    ].map(TargetFormat.init(line:))

    static let all = plain + compressed
}

/// qemu-img makes the source, swimg converts it, qemu-img judges the target.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct MatrixTests {
    static let modes = [
        "", "-m 1", "-m 3", "-m 8 -W", "-W", "-S 0", "-S 512", "-S 64k", "-S 1M", "-m 1 -W -S 0",
        "-m 3 -W -S 512", "-m 8 -S 4k",
    ]

    struct Pair: Sendable, CustomStringConvertible {
        let source: String
        let target: TargetFormat
        let mode: String

        var description: String { "\(source) to \(target) \(mode)" }
    }

    /// Every source with every target; the modes rotate, so that each occurs with every source and
    /// target.
    static let pairs: [Pair] = SourceGallery.names.enumerated().flatMap { row, source in
        TargetFormat.all.enumerated().map { column, target in
            Pair(source: source, target: target, mode: modes[(row * 7 + column) % modes.count])
        }
    }

    /// Every target with every mode, from one raw and one qcow2 source.
    static let allModes: [Pair] = ["raw-sparse", "extended-16k"].flatMap { source in
        TargetFormat.all.flatMap { target in
            modes.map { Pair(source: source, target: target, mode: $0) }
        }
    }

    @Test(arguments: some(pairs.count / 6, of: pairs))
    func everySourceToEveryTarget(_ pair: Pair) throws {
        try convertAndJudge(pair)
    }

    @Test(arguments: some(allModes.count / 8, of: allModes))
    func everyTargetInEveryMode(_ pair: Pair) throws {
        try convertAndJudge(pair)
    }

    private func convertAndJudge(_ pair: Pair) throws {
        let folder = try TempFolder()
        let source = try SourceGallery.named(pair.source)
        let target = folder.path("target")
        // Little memory makes several chunks of a small disk.
        let words = pair.mode.words + ["--memory", "1M"]
        let outcome = try Swimg.convert(
            words + ["-f", source.format] + pair.target.options + [source.path, target])
        try judge(outcome, target, pair.target.format, against: SourceGallery.reference)
        #expect(folder.names == ["target"], "\(outcome)")
        // swimg must be able to read its own target.
        let back = try Swimg.convert(
            "-f", pair.target.format, "-O", "raw", target, folder.path("back"))
        #expect(back.isSuccess, "\(outcome)\n\(back)")
        #expect(
            try mismatch(contents(folder.path("back")), SourceGallery.content) == nil,
            "\(outcome)\n\(back)")
    }

    /// Other tests rely on qemu-img finding the same disk in every image of the gallery.
    @Test(arguments: SourceGallery.names)
    func galleryHoldsOneDisk(_ name: String) throws {
        let image = try SourceGallery.named(name)
        let difference = try Qemu.difference(
            image.path, image.format, SourceGallery.reference, "raw")
        #expect(difference == nil)
    }

    static let sizes = [0, 1, 511, 512, 513, 4095, 4097, 65535, 65536, 65537, 1_048_577, 2_096_640]

    @Test(
        arguments: some(
            of: sizes, with: ["-O raw", "-O qcow2", "-O qcow2 -o cluster_size=512", "-c -O qcow2"]))
    func oddSizes(_ size: Int, _ target: String) throws {
        let folder = try TempFolder()
        let source = folder.path("source")
        try Data(SourceGallery.content + SourceGallery.content).prefix(size)
            .write(to: URL(fileURLWithPath: source))
        let format = TargetFormat(line: target)
        for mode in [["-m", "1"], ["-W"], ["-S", "0"]] {
            let outcome = try Swimg.convert(
                mode + ["-f", "raw"] + format.options + [source, folder.path("target")])
            try judge(outcome, folder.path("target"), format.format, against: source)
            if format.format == "raw" {
                let bytes = try contents(folder.path("target"))
                #expect(bytes.count == (size + 511) / 512 * 512, "\(outcome)")
            }
            let back = try Swimg.convert(
                "-f", format.format, folder.path("target"), folder.path("back"))
            #expect(back.isSuccess, "\(outcome)\n\(back)")
            let bytes = try contents(folder.path("back"))
            #expect(
                try mismatch(bytes.prefix(size), contents(source)) == nil, "\(outcome)\n\(back)")
            #expect(bytes.dropFirst(size).allSatisfy { $0 == 0 } && bytes.count % 512 == 0)
        }
    }

    /// swimg's raw targets must be identical to qemu-img's.
    @Test(arguments: SourceGallery.names)
    func rawTargetsAreQemusByteForByte(_ name: String) throws {
        let folder = try TempFolder()
        let source = try SourceGallery.named(name)
        try Qemu.img(
            "convert", "-f", source.format, "-O", "raw", source.path, folder.path("qemu.raw"))
        for mode in [["-m", "1"], ["-m", "8", "-W"]] {
            let outcome = try Swimg.convert(
                mode + ["-f", source.format, "-O", "raw", source.path, folder.path("own.raw")])
            #expect(outcome.isSuccess, "\(outcome)")
            let (own, theirs) = (folder.path("own.raw"), folder.path("qemu.raw"))
            #expect(try mismatch(contents(own), contents(theirs)) == nil, "\(outcome)")
        }
    }

    /// A nearly empty 2 TiB disk: neither time nor memory may grow with the virtual size.
    @Test func hugeAndNearlyEmpty() throws {
        let folder = try TempFolder()
        try Qemu.img("create", "-q", "-f", "qcow2", folder.path("source"), "2T")
        try Qemu.io(
            "qcow2", folder.path("source"),
            ["write -P 7 0 64k", "write -P 8 1T 4k", "write -P 9 2199023190016 64k"])
        for options in [["-O", "qcow2"], ["-O", "raw"], ["-c", "-O", "qcow2", "-m", "1"]] {
            let outcome = try Swimg.convert(
                options + ["-f", "qcow2", folder.path("source"), folder.path("target")], timeout: 60
            )
            let format = options.contains("raw") ? "raw" : "qcow2"
            try judge(
                outcome, folder.path("target"), format, against: folder.path("source"), "qcow2")
            let allocated = try #require(FileStatus(folder.path("target"))).allocated
            #expect(allocated < 64 << 20, "\(outcome)")
        }
    }
}

/// Expects silent success, the same content and a sound image.
func judge(
    _ outcome: Outcome, _ target: String, _ format: String, against reference: String,
    _ referenceFormat: String = "raw", at location: SourceLocation = #_sourceLocation
) throws {
    #expect(
        outcome.isSuccess && outcome.errors.isEmpty && outcome.output.isEmpty, "\(outcome)",
        sourceLocation: location)
    let difference = try Qemu.difference(target, format, reference, referenceFormat)
    #expect(difference == nil, "\(outcome)", sourceLocation: location)
    if format == "qcow2" {
        let damage = try Qemu.damage(target)
        #expect(damage == nil, "\(outcome)", sourceLocation: location)
    }
}
