import Foundation
import TestSupport
import Testing

/// `dd` makes the same target as qemu-img's.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct DdTests {
    static let slices = [
        "", "count=0", "count=3", "bs=1 count=3", "bs=100 count=3 skip=1", "bs=1k count=10 skip=4",
        "bs=1k count=4 skip=10", "bs=1M skip=1", "bs=1M skip=1k", "bs=1M skip=7E", "count=7E",
        "bs=1.5k skip=3", "bs=3000 count=100 skip=7", "bs=700000", "bs=2147483647", "bs=64k skip=1",
        "bs=1k bs=2k count=1", "skip=1 bs=65537 count=12", "bs=512 skip=2563",
    ]

    @Test(
        arguments: some(of: ["raw-sparse", "zlib-512", "extended-2M", "chain-deep"], with: slices))
    func copies(_ name: String, _ slice: String) throws {
        let image = try SourceGallery.named(name)
        for format in ["raw", "qcow2"] {
            let own = try TempFolder()
            let theirs = try TempFolder()
            let words = ["dd", "-f", image.format, "-O", format, "if=\(image.path)", "of=target"]
            let expected = try run("qemu-img", words + slice.words, in: theirs.path)
            let outcome = try run(Swimg.path, words + slice.words, in: own.path)
            #expect(outcome.status == expected.status && outcome.output == expected.output)
            // Skipping too far causes a warning.
            let warning = expected.errorText.replacingOccurrences(
                of: "qemu-img: ", with: Swimg.prefix)
            #expect(outcome.errorText == warning, "\(outcome)\n\(expected)")
            #expect(own.names == ["target"])
            if format == "raw" {
                let difference = try mismatch(
                    contents(own.path("target")), contents(theirs.path("target")))
                #expect(difference == nil, "\(outcome)")
            } else {
                let compared = try run(
                    "qemu-img",
                    ["compare", "-f", "qcow2", "-F", "qcow2", own.path("target")]
                        + [theirs.path("target")])
                #expect(compared.outputText == "Images are identical.\n", "\(outcome)\n\(compared)")
                #expect(try Qemu.damage(own.path("target")) == nil)
            }
        }
    }

    @Test(arguments: [
        "", "if=disk", "of=target", "if=disk of=target foo", "if=disk of=target seek=3",
        "if=disk of=target conv=notrunc", "if=disk of=target bs=nothing",
        "if=disk of=target bs=0", "if=disk of=target bs=4G", "if=disk of=target count=-1",
        "if=disk of=target skip=", "if=disk of=target skip=9E",
    ])
    func refusals(_ line: String) throws {
        let folder = try TempFolder()
        _ = try folder.write("disk", noise(1, 4096))
        let theirs = try run("qemu-img", ["dd"] + line.words, in: folder.path)
        let own = try run(Swimg.path, ["dd"] + line.words, in: folder.path)
        #expect(own.status == 1 && theirs.status == 1 && own.output.isEmpty, "\(own)\n\(theirs)")
        // qemu-img breaks one of its lines.
        let reason = theirs.errorText.dropFirst("qemu-img: ".count).prefix { $0 != "\n" }
        #expect(own.errorText.hasPrefix(Swimg.prefix + reason), "\(own)\n\(theirs)")
        #expect(folder.names == ["disk"])
    }

    /// qemu-img empties the source in this case.
    @Test func sourceIsNotTheTarget() throws {
        let folder = try TempFolder()
        let bytes = noise(2, 65536)
        let disk = try folder.write("disk", bytes)
        let outcome = try run(Swimg.path, ["dd", "if=\(disk)", "of=\(disk)"])
        #expect(outcome.status == 1, "\(outcome)")
        #expect(try Array(contents(disk)) == bytes)
    }
}
