import Foundation
import TestSupport
import Testing

/// swimg and qemu-img bench copies of the same images.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct BenchTests {
    private let folder: TempFolder

    init() throws { folder = try TempFolder() }

    /// An image with data of its own, data of a backing file, zeros and compressed clusters.
    private func makeImage(_ options: String) throws {
        try writeNoise(folder.path("base"), count: 2 << 20)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "raw", "image",
            "2000384", in: folder.path)
        try Qemu.io(
            "qcow2", folder.path("image"),
            ["write -P 1 100k 300k", "write -z 500k 100k", "write -c -P 2 640k 64k"])
    }

    private func lines(_ text: String) -> [String] {
        text.components(separatedBy: "\n").map {
            $0.replacing(#/completed in \d+\.\d{3} seconds/#, with: "completed")
        }
    }

    /// The lines that are printed, and the disk afterwards.
    @Test(arguments: [
        "-c 100 image", "-c 100 -d 4 -o 3000 -s 5000 -S 70000 image", "-c 0 image",
        "-w -c 50 --pattern=7 image", "-w -c 100 -d 3 -s 512 -S 3584 -o 1k --pattern=0x41 image",
        "-w -c 14 -d 5 -s 100k -S 130k --pattern=3 --flush-interval=6 image",
        "-w -c 15 -d 5 -s 130k --pattern=3 --flush-interval=5 --no-drain -t writethrough image",
        "-w -f raw -c 33 --pattern=5 -s 1000 base", "-w -c 9 -S 1M -s 1000 --pattern=9 image",
        "-c 2 -q -i threads -t none -n image", "-U -c 1 image",
        "-c 3 --image-opts driver=qcow2,file.filename=image",
    ])
    func answersLikeQemu(_ line: String) throws {
        for options in line.contains("-w")
            ? ["compat=1.1", "cluster_size=4k", "extended_l2=on"] : ["compat=1.1"]
        {
            try makeImage(options)
            let twins = try Twins(copying: folder)
            let other = try run("qemu-img", ["bench"] + line.words, in: twins.theirs.path)
            let outcome = try run(Swimg.path, ["bench"] + line.words, in: folder.path)
            #expect(other.isSuccess && outcome.isSuccess, "\(outcome)\n\(other)")
            #expect(lines(outcome.outputText) == lines(other.outputText), "\(outcome)\n\(other)")
            #expect(outcome.errors.isEmpty, "\(outcome)")
            try twins.expectSame("image", "qcow2", line)
            try twins.expectSame("base", "raw", line)
        }
    }

    /// Snapshots keep what they recorded.
    @Test func snapshotsStay() throws {
        try makeImage("compat=1.1")
        try Qemu.img("snapshot", "-c", "s", folder.path("image"))
        let before = folder.path("before")
        try Qemu.img("convert", "-l", "s", "-O", "raw", folder.path("image"), before)
        let outcome = try run(
            Swimg.path,
            [
                "bench", "-w", "-c", "400", "--pattern=4", "--flush-interval=64",
                folder.path("image"),
            ])
        #expect(outcome.isSuccess, "\(outcome)")
        #expect(try Qemu.damage(folder.path("image")) == nil)
        try Qemu.img("snapshot", "-a", "s", folder.path("image"))
        #expect(try Qemu.difference(before, "raw", folder.path("image"), "qcow2") == nil)
    }

    /// Exports take reads and writes, too.
    @Test(.enabled(if: NBDTestServer.isInstalled, "needs nbdkit"))
    func exports() throws {
        let server = try NBDTestServer.nbdkit("memory", "4M")
        let outcome = try run(
            Swimg.path,
            [
                "bench", "-w", "-f", "raw", "-c", "1024", "-d", "100", "--pattern=6",
                "--flush-interval=128", server.uri,
            ])
        #expect(outcome.isSuccess, "\(outcome)")
        try writeFilled(folder.path("expected"), byte: 6, count: 4 << 20)
        #expect(try Qemu.difference(folder.path("expected"), "raw", server.uri, "raw") == nil)
        #expect(try run(Swimg.path, ["bench", "-c", "100", server.uri]).isSuccess)
    }

    /// Encrypted images cannot be written to by single requests, and are left as they were.
    @Test func refusesToWrite() throws {
        let image = folder.path("other")
        try EncryptedImage.make("qcow2", image, size: "1M")
        let before = try contents(image)
        let outcome = try run(
            Swimg.path,
            ["bench", "-w", "-c", "1"] + EncryptedImage.secret
                + ["--image-opts", EncryptedImage.options("qcow2", image)])
        #expect(outcome.status == 1 && outcome.output.isEmpty, "\(outcome)")
        #expect(outcome.errorText.contains("encrypted"), "\(outcome)")
        #expect(try contents(image) == before)
    }

    @Test(arguments: [
        "", "image image", "nosuch", "-c x image", "-c -1 image", "-d x image", "-o x image",
        "-S 3G image", "--pattern=256 image", "-i foo image", "-t foo image",
        "--flush-interval=5 image", "-w --flush-interval=5 -d 6 image", "-U -w image",
        "-c 3 -o 3M image", "-f foo image", "-c 1 -s 4M image",
    ])
    func refusesLikeQemu(_ line: String) throws {
        try makeImage("compat=1.1")
        let link = folder.path("qemu-img")
        try FileManager.default.createSymbolicLink(atPath: link, withDestinationPath: Swimg.path)
        let other = try run("qemu-img", ["bench"] + line.words, in: folder.path)
        let outcome = try run(link, ["bench"] + line.words, in: folder.path)
        #expect(outcome.status == other.status, "\(outcome)\n\(other)")
        #expect(outcome.errorText == other.errorText, "\(outcome)\n\(other)")
        #expect(outcome.outputText == other.outputText, "\(outcome)\n\(other)")
    }

    /// Requests that would reach over the end begin at the start of the disk again.
    @Test func endsWithTheDisk() throws {
        try writeFilled(folder.path("disk"), byte: 1, count: 10_000)
        let outcome = try run(
            Swimg.path, ["bench", "-w", "-f", "raw", "-c", "7", "--pattern=2", "disk"],
            in: folder.path)
        #expect(outcome.isSuccess, "\(outcome)")
        let expected = [UInt8](repeating: 2, count: 8192) + [UInt8](repeating: 1, count: 1808)
        #expect(try mismatch(contents(folder.path("disk")), Data(expected)) == nil)
    }
}
