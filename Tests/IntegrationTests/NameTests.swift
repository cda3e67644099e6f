import Foundation
import TestSupport
import Testing

/// Names are bytes, and names with a protocol prefix are not files.
@Suite struct NameTests {
    let folder: TempFolder
    let sketch = DiskSketch("A1-b0+-C")

    init() throws {
        folder = try TempFolder()
        try sketch.writeRaw(folder.path("source"))
    }

    /// The names in the folder as bytes, as the kernel reports them.
    private func names() throws -> Set<[UInt8]> {
        let listing = try run("find", [".", "-mindepth", "1", "-printf", "%P\\0"], in: folder.path)
        return Set(listing.output.split(separator: 0).map { Array($0) })
    }

    private func swimg(_ words: [UInt8]...) throws -> Outcome {
        try run(Swimg.path, bytes: words, in: folder.path)
    }

    private static let odd: [[UInt8]] = [
        [0x6f, 0xe8], [0x6f, 0xe9], [0xff], [0xf0, 0x9f], Array("\u{301}x".utf8), [0xcc],
        Array("e\u{301}".utf8), Array("\u{e9}".utf8), [0xf4, 0x8f, 0xbe, 0x80], [0xed, 0xa0, 0x80],
    ]

    /// Two names that look equal as text are two files.
    @Test func eachNameIsAFileOfItsOwn() throws {
        for name in Self.odd {
            expectSuccess(try swimg("convert".b, "-O".b, "raw".b, "source".b, name))
        }
        #expect(try names() == Set(Self.odd + ["source".b]))
        for name in Self.odd {
            let back = try swimg("dd".b, "if=".b + name, "of=".b + name + ".copy".b)
            expectSuccess(back)
            #expect(
                try run("cmp", bytes: ["source".b, name + ".copy".b], in: folder.path).isSuccess)
        }
        #expect(try names().count == 2 * Self.odd.count + 1)
    }

    /// Escape sequences in names never reach a terminal, whatever the source of the name.
    @Test func controlCharactersAreShownOnly() throws {
        let name = Array("a\u{1B}[31mb\nc\u{9B}".utf8)
        let lines: [[[UInt8]]] = [
            ["create".b, "-f".b, "raw".b, name, "1M".b], ["digest".b, "-f".b, "raw".b, name],
            ["create".b, "-f".b, "qcow2".b, "-u".b, "-b".b, name, "-F".b, "raw".b, "x".b, "1M".b],
            ["convert".b, "--digest".b, "-O".b, "raw".b, "source".b, name],
        ]
        for line in lines {
            let outcome = try run(Swimg.path, bytes: line, in: folder.path)
            #expect(outcome.isSuccess && outcome.outputText.contains("a?[31mb?c?"), "\(outcome)")
            let shown = outcome.outputText.dropLast().unicodeScalars
            #expect(!shown.contains { $0.properties.generalCategory == .control }, "\(outcome)")
        }
    }

    /// An error about a bad backing file also names the image that refers to it.
    @Test func resizeSaysWhoseBackingFileIsBad() throws {
        for (name, format) in [("nosuch", "raw"), ("source", "qcow2")] {
            let made = try run(
                Swimg.path, "create -q -u -f qcow2 -b \(name) -F \(format) overlay 1M".words,
                in: folder.path)
            #expect(made.isSuccess, "\(made)")
            let outcome = try run(Swimg.path, ["resize", "overlay", "2M"], in: folder.path)
            expectRefusal(outcome, says: name)
            #expect(outcome.errorText.contains("overlay"), "\(outcome)")
        }
    }

    @Test(arguments: odd)
    func foldersToo(_ name: [UInt8]) throws {
        try #require(run("mkdir", bytes: [name], in: folder.path).isSuccess)
        let target = name + "/".b + name
        expectSuccess(try swimg("convert".b, "-O".b, "qcow2".b, "source".b, target))
        // Repeats the conversion over the existing target, which splits the path again.
        expectSuccess(try swimg("convert".b, "-O".b, "raw".b, "source".b, target))
        #expect(try names() == ["source".b, name, target])
    }

    @Test(arguments: odd)
    func backingNamesAreStoredAsTheyAre(_ name: [UInt8]) throws {
        expectSuccess(try swimg("convert".b, "-O".b, "raw".b, "source".b, name))
        let ways: [[[UInt8]]] = [
            ["-b".b, name, "-F".b, "raw".b], ["-o".b, "backing_fmt=raw,backing_file=".b + name],
        ]
        for (number, way) in ways.enumerated() {
            let overlay = "over\(number)".b
            let made = try run(
                Swimg.path, bytes: ["create".b, "-q".b, "-f".b, "qcow2".b] + way + [overlay],
                in: folder.path)
            expectSuccess(made)
            let header = [UInt8](try contents(folder.path("over\(number)")).prefix(1024))
            let stored = Data(header).range(of: Data([0] + name + [0])) != nil
            #expect(stored, "\(made)")
            expectSuccess(try swimg("convert".b, overlay, "flat".b))
            #expect(try mismatch(contents(folder.path("flat")), sketch.bytes) == nil)
        }
    }

    @Test(arguments: odd)
    func optionsOfAnImageHoldNames(_ name: [UInt8]) throws {
        expectSuccess(try swimg("convert".b, "-O".b, "raw".b, "source".b, name))
        let options = "driver=raw,file.driver=file,file.filename=".b + name
        expectSuccess(try swimg("convert".b, "--image-opts".b, options, "flat".b))
        #expect(try mismatch(contents(folder.path("flat")), sketch.bytes) == nil)
    }

    @Test func linksLeadWhereTheirBytesSay() throws {
        try #require(
            run("ln", bytes: ["-s".b, [0x6f, 0xe8], "link".b], in: folder.path).isSuccess)
        expectSuccess(try swimg("convert".b, "source".b, "link".b))
        #expect(try names() == ["source".b, "link".b, [0x6f, 0xe8]])
    }

    /// A temporary name contains a part of the target's name, truncated by bytes.
    @Test func longNamesCanBeReplaced() throws {
        // Five characters of 51 bytes each.
        let one = "e" + String(repeating: "\u{301}", count: 25)
        let long = Array(String(repeating: one, count: 5).utf8)
        #expect(long.count == 255)
        for _ in 0..<2 {
            expectSuccess(try swimg("convert".b, "source".b, long))
            let copy = try swimg("convert".b, "-n".b, "source".b, long)
            expectSuccess(copy)
        }
        #expect(try names() == ["source".b, long])
    }

    @Test func messagesAreText() throws {
        for words in [["info".b, [0xe8]], ["convert".b, "--x".b + [0xe8], "a".b, "b".b]] {
            expectRefusal(try run(Swimg.path, bytes: words, in: folder.path), says: "\u{fffd}")
        }
        expectRefusal(try swimg("convert".b, "-f".b, "é".b, "a".b, "b".b), says: "'é'")
    }

    private static let protocols = [
        "sheepdog:vm1", "gluster:x", "host_device:x", "fd:4", "ftp://localhost/x", "a:b", ":x",
        "a b:c", "blkdebug::x", "nbd+x://y",
    ]

    @Test(arguments: protocols)
    func protocolsAreNoFiles(_ name: String) throws {
        _ = try folder.write("a:b", [1])
        let before = folder.names
        for words in [
            ["convert", "source", name], ["convert", "-O", "qcow2", "source", name],
            ["convert", "-n", "source", name], ["convert", name, "target"],
            ["create", "-f", "raw", name, "1M"], ["create", "-f", "qcow2", name, "1M"],
            ["dd", "if=source", "of=\(name)"], ["dd", "if=\(name)", "of=target"], ["info", name],
            ["map", name], ["check", name], ["digest", name], ["measure", name],
            ["resize", "-f", "raw", name, "1M"],
        ] {
            let outcome = try run(Swimg.path, words, in: folder.path)
            expectRefusal(outcome, says: "the protocol '\(name.prefix { $0 != ":" })'")
            #expect(folder.names == before, "\(outcome)")
        }
        #expect(try run(Swimg.path, ["compare", name, "source"], in: folder.path).status == 2)
    }

    @Test(arguments: ["./a:b", "file:a:b", "file:./nbd://x", "file:json:{}", "sub/a:b"])
    func filesWithColons(_ name: String) throws {
        _ = try folder.makeFolder("sub")
        _ = try folder.makeFolder("nbd:")
        for options in [["-O", "qcow2"], ["-O", "raw"], ["-O", "raw"], ["-n", "-O", "raw"]] {
            expectSuccess(try Swimg.convert(options + ["source", name], in: folder.path))
        }
        expectSuccess(try Swimg.convert(name, "back", in: folder.path))
        #expect(try mismatch(contents(folder.path("back")), sketch.bytes) == nil)
        let file = name.hasPrefix("file:") ? String(name.dropFirst(5)) : name
        #expect(FileStatus(folder.path(file)) != nil, "\(folder.names)")
        let overlay = try run(
            Swimg.path, ["create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", "file:o:1"],
            in: folder.path)
        expectSuccess(overlay)
        expectSuccess(try Swimg.convert("./o:1", "back", in: folder.path))
        #expect(try mismatch(contents(folder.path("back")), sketch.bytes) == nil)
        guard Qemu.isInstalled, file != "json:{}" else { return }
        let difference = try run(
            "qemu-img", ["compare", "-F", "raw", "./o:1", "source"], in: folder.path)
        #expect(difference.isSuccess, "\(difference)")
    }
}

extension String {
    /// The UTF-8 bytes of a word.
    fileprivate var b: [UInt8] { Array(utf8) }
}
