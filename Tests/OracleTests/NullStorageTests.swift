import Foundation
import TestSupport
import Testing

/// `null-co`: a disk of zeros that stores nothing.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct NullStorageTests {
    /// Names with an explicit raw format: without one, qemu names the format null-co.
    static let names = [
        "null-co://",
        #"json:{"driver":"raw","file":{"driver":"null-co","size":1048576,"read-zeroes":true}}"#,
    ]

    @Test(arguments: names)
    func isADiskOfZeros(_ name: String) throws {
        let folder = try TempFolder()
        let theirs = try run("qemu-img", ["info", name]).outputText.split(separator: "\n")
        let own = try run(Swimg.path, ["info", name]).outputText.split(separator: "\n")
        // qemu repeats the whole description as the name.
        #expect(own.dropFirst().elementsEqual(theirs.dropFirst()), "\(own)\n\(theirs)")
        for format in ["raw", "qcow2"] {
            let target = folder.path(format)
            let outcome = try Swimg.convert("-O", format, name, target)
            #expect(outcome.isSuccess, "\(outcome)")
            let zeros = try run(Swimg.path, ["compare", "-F", format, name, target])
            #expect(zeros.isSuccess, "\(zeros)")
        }
        let size = try Qemu.img("info", "--output=json", folder.path("raw"))
        #expect(size.contains("\"actual-size\": ") && !size.contains("\"actual-size\": 1048576"))
    }

    @Test func forgetsWhatIsWritten() throws {
        let folder = try TempFolder()
        let source = try DiskSketch("A-1B").writeRaw(folder.path("source"))
        let name = #"json:{"driver":"null-co","size":262144}"#
        let outcome = try Swimg.convert("-n", "-f", "raw", "-O", "raw", source, name)
        #expect(outcome.isSuccess, "\(outcome)")
        let small = try Swimg.convert(
            "-n", "-f", "raw", "-O", "raw", source, #"json:{"driver":"null-co","size":65536}"#)
        #expect(small.status == 1 && small.errorText.contains("is smaller"), "\(small)")
    }

    /// An image that is kept nowhere is not made by mistake: `-n` says that it is meant.
    @Test func isNotCreated() throws {
        let folder = try TempFolder()
        let source = try DiskSketch("A-1B").writeRaw(folder.path("source"))
        for words in [
            ["convert", "-O", "raw", source, "null-co://"],
            ["convert", "-O", "qcow2", source, "null-co://"],
            ["create", "-q", "-f", "raw", "null-co://", "1M"],
        ] {
            #expect(try !run("qemu-img", words).isSuccess)
            let own = try run(Swimg.path, words)
            #expect(own.status == 1 && own.errorText.contains("image creation"), "\(own)")
            #expect(own.errorText.split(separator: "\n").count == 1, "\(own)")
        }
    }

    /// An image can name it as a backing file.
    @Test func canBeBelowAnImage() throws {
        let folder = try TempFolder()
        let overlay = folder.path("overlay.qcow2")
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", Self.names[1], "-F", "raw", overlay)
        try Qemu.io("qcow2", overlay, ["write -P 5 64k 3k"])
        try compareMap([overlay])
        try Swimg.convert(overlay, folder.path("raw"))
        #expect(try Qemu.difference(overlay, "qcow2", folder.path("raw"), "raw") == nil)
    }
}
