import Foundation
import TestSupport
import Testing

/// Called by the name qemu-img, the program refuses in qemu-img's words, letter by letter: Nova and
/// others search for `Could not open '…'` and the like.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct QemuWordsTests {
    let folder: TempFolder
    let link: String

    init() throws {
        folder = try TempFolder()
        link = try folder.makeFolder("bin") + "/qemu-img"
        try FileManager.default.createSymbolicLink(atPath: link, withDestinationPath: Swimg.path)
        try Qemu.img("create", "-q", "-f", "qcow2", "ok.qcow2", "1M", in: folder.path)
        try Qemu.img("create", "-q", "-f", "raw", "base.raw", "1M", in: folder.path)
        _ = try folder.write("garbage", Array("garbage".utf8))
        for (name, base) in [("over", "missing"), ("higher", "over.qcow2"), ("odd", "garbage")] {
            try Qemu.img(
                "create", "-q", "-f", "qcow2", "-u", "-b", base, "-F",
                name == "over" ? "raw" : "qcow2", "\(name).qcow2", "1M", in: folder.path)
        }
        for (name, offset, byte) in Self.damages {
            var image = try contents(folder.path("ok.qcow2"))
            image[offset] = byte
            try image.write(to: URL(fileURLWithPath: folder.path("\(name).qcow2")))
        }
        // The names of bits 62 and 63, the latter first; bit 61 has none.
        var names = Array(repeating: UInt8(0), count: 96)
        for (place, bit, name) in [(0, 63, "later feature"), (48, 62, "earlier feature")] {
            names[place + 1] = UInt8(bit)
            names.replaceSubrange(place + 2..<place + 2 + name.utf8.count, with: name.utf8)
        }
        var image = try contents(folder.path("ok.qcow2"))
        image[72] = 0xe0
        // The image's own table of names is its first header extension.
        try #require(Array(image[112..<116]) == [0x68, 0x03, 0xf8, 0x57])
        image.replaceSubrange(120..<216, with: names)
        try image.write(to: URL(fileURLWithPath: folder.path("named.qcow2")))
    }

    static let damages: [(String, Int, UInt8)] = [
        ("feature", 72, 0x80), ("version", 7, 9), ("cluster", 23, 5), ("large", 36, 0xff),
        ("small", 39, 0),
    ]

    static let images = [
        "missing", "over.qcow2", "higher.qcow2", "odd.qcow2", "feature.qcow2", "named.qcow2",
        "version.qcow2", "cluster.qcow2", "large.qcow2", "foo:bar",
    ]

    @Test(arguments: [
        "map NAME", "convert -O raw NAME out", "measure NAME", "compare ok.qcow2 NAME",
        "compare NAME ok.qcow2", "resize NAME 2M", "dd if=NAME of=out",
        "convert -n -O qcow2 base.raw NAME",
    ])
    func imagesThatCannotBeOpened(_ line: String) throws {
        for image in Self.images {
            if image == "foo:bar", line.hasPrefix("resize") || line.contains("-n") { continue }
            try compareRefusal(line.replacingOccurrences(of: "NAME", with: image).words)
        }
    }

    /// Neither opens backing files.
    @Test(arguments: ["info", "check"])
    func imagesWithoutTheirChain(_ verb: String) throws {
        for image in Self.images where !["over", "higher", "odd"].contains(where: image.hasPrefix) {
            try compareRefusal([verb, image])
        }
    }

    @Test(arguments: [
        "info -f qcow2 garbage", "check -f qcow2 garbage", "map -f qcow2 garbage",
        "convert -f qcow2 garbage out", "resize -f qcow2 garbage 1M", "info -f nosuch ok.qcow2",
        "check -f nosuch ok.qcow2", "map -f nosuch ok.qcow2", "convert -f nosuch ok.qcow2 out",
        "measure -f nosuch ok.qcow2", "compare -f nosuch ok.qcow2 ok.qcow2",
        "compare -F nosuch ok.qcow2 ok.qcow2", "resize -f nosuch ok.qcow2 1M",
        "dd -f nosuch if=ok.qcow2 of=out", "convert -O nosuch ok.qcow2 out",
        "create -f nosuch out 1M", "dd -O nosuch if=ok.qcow2 of=out",
        "convert -O raw ok.qcow2 no/where", "convert -n -O raw ok.qcow2 no/where",
        "create -f qcow2 no/where 1M", "create -f raw no/where 1M",
        "dd if=ok.qcow2 of=no/where", "resize ok.qcow2 1M 2M", "check -r foo ok.qcow2",
        "dd foo", "dd if=ok.qcow2 of=out bs=x", "dd if=ok.qcow2 of=out bs=0", "dd",
        "create -f qcow2 -b missing -F raw out", "create -f qcow2 -b garbage -F qcow2 out",
        "create -f qcow2 -b over.qcow2 -F qcow2 out", "create -f qcow2 -b base.raw out",
        "create -f qcow2 -b ok.qcow2 out 2M", "create -f qcow2 -u -b ok.qcow2 out 2M",
        "create -f qcow2 -b base.raw -F nosuch out",
        "convert -B base.raw -O qcow2 ok.qcow2 out",
        "convert -B base.raw -F raw -O qcow2 ok.qcow2 ok.qcow2 out",
        "convert -t foo ok.qcow2 out", "convert -T foo ok.qcow2 out", "map --output=x ok.qcow2",
        "info --output=x ok.qcow2", "check --output=x ok.qcow2", "convert -S 511 ok.qcow2 out",
        "convert -S 17M ok.qcow2 out", "convert -S x ok.qcow2 out", "convert -S 16E ok.qcow2 out",
        "convert --target-is-zero ok.qcow2 out", "convert -n -o size=1M ok.qcow2 base.raw",
        "convert -c -O raw ok.qcow2 out", "convert -C -S 4k ok.qcow2 out",
        "convert -C -c -O qcow2 ok.qcow2 out", "convert ok.qcow2", "convert",
        "info", "info a b", "check", "map", "compare a", "create", "create a 1M c", "info -f",
        "info --wrong ok.qcow2", "info -Z ok.qcow2", "convert -B", "measure",
        "measure -l snapshot.foo=bar ok.qcow2", "convert -l snapshot.foo=bar ok.qcow2 out",
        "measure -l nosuch ok.qcow2", "convert -l nosuch ok.qcow2 out", "measure a b",
        "measure --size 1M ok.qcow2", "measure -f qcow2", "measure --size 1M -f qcow2",
        "measure --image-opts", "measure -o ,", "measure -l snapshot.foo=bar", "measure --size -1",
        "measure -O foo ok.qcow2",
        "create -f qcow2 out -- -1k", "create -f qcow2 out -- 1kilobyte", "create out 16E",
        "create -f qcow2 -o size=-1k out", "create -f qcow2 -o size=1kilobyte out",
        "create -f qcow2 -o size=16E out", "create -f qcow2 -o cluster_size= out 1M",
        "create -f qcow2 -o size=10M out 20M", "create -f qcow2 -o refcount_bits=16.0 out 1M",
        "resize ok.qcow2 +1x", "create -f qcow2 -o , out 1M", "create -f qcow2 -o ,, out 1M",
        "create -f qcow2 -o ,help out", "create -f qcow2 -o help, out",
        "create -f qcow2 -o cluster_size=4k, out 1M", "create -f qcow2 -o lazy_refcounts,,x out 1M",
        "create -f qcow2 -o cluster_size=4k,,help out", "create -f qcow2 -o foo out 1M",
        "create -f qcow2 -o =x out 1M", "create -f qcow2 -o help=1 out 1M",
        "measure -O qcow2 -o ,, ok.qcow2", "convert -O qcow2 -o ,, ok.qcow2 out", "foo", "",
    ])
    func mistakes(_ line: String) throws { try compareRefusal(line.words) }

    /// qemu-img allows 16 of them.
    @Test(arguments: ["0", "65", "-1", "1x", "4.0", "", "99999999999999999999"])
    func wrongNumbersOfCoroutines(_ number: String) throws {
        let own = try run(link, ["convert", "-m", number, "ok.qcow2", "out"], in: folder.path)
        #expect(own.status == 1)
        #expect(
            own.errorText
                == "qemu-img: Invalid number of coroutines. Allowed number of coroutines is "
                + "between 1 and 64\n")
    }

    @Test(arguments: ["0x10", "+4", " 4", "010"])
    func numbersAsInC(_ number: String) throws {
        for program in ["qemu-img", link] {
            try require(
                program, ["convert", "-m", number, "-O", "raw", "ok.qcow2", "out"],
                in: folder.path)
        }
    }

    @Test(.enabled(if: hasProgram("qemu-nbd"), "a running qemu-nbd holds the locks"))
    func aLockedImage() throws {
        let server = try NBDTestServer.qemu("-f", "qcow2", folder.path("ok.qcow2"))
        defer { server.stop() }
        for line in ["info ok.qcow2", "convert ok.qcow2 out", "map ok.qcow2"] {
            try compareRefusal(line.words)
        }
    }

    private func compareRefusal(
        _ words: [String], at location: SourceLocation = #_sourceLocation
    ) throws {
        let theirs = try run("qemu-img", words, in: folder.path)
        try? FileManager.default.removeItem(atPath: folder.path("out"))
        let own = try run(link, words, in: folder.path)
        #expect(own.status == theirs.status, "\(own)\n\(theirs)", sourceLocation: location)
        // qemu-img does not end every line.
        let text = theirs.errorText
        #expect(
            own.errorText == text + (text.hasSuffix("\n") ? "" : "\n"), "\(own)\n\(theirs)",
            sourceLocation: location)
        #expect(own.output == theirs.output, "\(own)\n\(theirs)", sourceLocation: location)
        // Under its own name, the program says it in one line.
        let plain = try run(Swimg.path, words, in: folder.path)
        #expect(plain.status == theirs.status, "\(plain)", sourceLocation: location)
        #expect(
            plain.errorText.filter(\.isNewline).count == 1, "\(plain)", sourceLocation: location)
    }
}
