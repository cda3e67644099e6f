import Foundation
import TestSupport
import Testing

/// `json:{…}` and `--image-opts` as qemu-img takes them, and what it shows of such images.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct DescribedImageTests {
    let folder: TempFolder

    init() throws {
        folder = try TempFolder()
        try DiskSketch("A1b0+-CC", cluster: 65536).writeRaw(folder.path("a.raw"))
        try DiskSketch("2-E2+1D0", cluster: 65536).writeRaw(folder.path("b.raw"))
        for name in ["a", "b"] {
            try Qemu.img("convert", "-O", "qcow2", "\(name).raw", "\(name).qcow2", in: folder.path)
        }
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "a.raw", "-F", "raw", "over.qcow2",
            in: folder.path)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "over.qcow2", "-F", "qcow2", "top.qcow2",
            in: folder.path)
        try Qemu.img("create", "-q", "-f", "qcow2", "alone.qcow2", "512k", in: folder.path)
        for (name, place) in [("over", "64k"), ("top", "192k"), ("alone", "320k")] {
            try Qemu.io("qcow2", folder.path("\(name).qcow2"), ["write -P 9 \(place) 64k"])
        }
        let image = try contents(folder.path("a.qcow2"))
        let archive = Data(repeating: 0x55, count: 1536) + image
        try archive.write(to: URL(fileURLWithPath: folder.path("archive")))
    }

    @Test(arguments: [
        [#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}"#],
        [#"json:{"driver":"raw","offset":512,"size":1024,"file.filename":"a.raw"}"#],
        [#"json:{"driver":"raw","offset":512,"file.filename":"a.raw"}"#],
        [#"json:{"driver":"raw","size":"1k","file":{"filename":"a.raw","locking":"off"}}"#],
        [#"json:{"driver":"raw","size":1024.0,"file.filename":"a.raw"}"#],
        [#"json:{"driver":"raw","file":{"filename":"a.raw"},"file.filename":"missing"}"#],
        [#"json:{"driver":"raw","file.filename":"missing","file":{"filename":"a.raw"}}"#],
        [
            #"json:{"driver":"qcow2","file":{"driver":"raw","offset":1536,"file":"#
                + #"{"driver":"file","filename":"archive"}}}"#
        ],
        [#"json:{"driver":"qcow2","file":{"driver":"raw","file.filename":"a.qcow2"}}"#],
        [#"json:{"driver":"file","filename":"over.qcow2"}"#],
        [#"json:{"driver":"null-co","size":65536}"#], [#"json:{"driver":"null-co"}"#],
        [#"json:{"driver":"null-co","size":65536,"read-zeroes":true}"#],
        [#"json:{"driver":"null-co","read-zeroes":true}"#], [#"json:{"driver":"null-aio"}"#],
        [#"json:{"driver":"null-aio","size":"64k"}"#], ["null-co://"], ["null-aio://"],
        [#"json:{"driver":"raw","file":{"driver":"null-co","size":65536}}"#],
        [#"json:{"driver":"raw","file":{"driver":"null-co"}}"#],
        [
            #"json:{"driver":"raw","file":{"driver":"null-co","size":65536,"latency-ns":5,"#
                + #""read-zeroes":false}}"#
        ],
        [#"json:{"driver":"qcow2","backing":null,"file.filename":"over.qcow2"}"#],
        [#"json:{"file.filename":"over.qcow2","read-only":true}"#],
        ["--image-opts", "driver=qcow2,file.driver=file,file.filename=a.qcow2"],
        ["--image-opts", "filename=a.raw"], ["--image-opts", "a.raw"],
        ["--image-opts", "driver=raw,file.filename=a.raw,offset=512"],
    ])
    func infoShowsWhatQemuShows(_ words: [String]) throws {
        try compareInfo(words, in: folder.path, at: #_sourceLocation)
    }

    /// QEMU's parser takes single quotes, and no comments.
    static let texts = [
        #"{"driver":"raw","file.filename":"a.raw"}"#, #"{'driver':'raw','file.filename':'a.raw'}"#,
        #"{'driver':"raw","file.filename":'a\u002eraw'}"#,
        " \n\t{ \"driver\" : \"raw\" ,\r\n \"file.filename\" : \"a.raw\" } ",
        #"{"driver":"raw",/* c */"file.filename":"a.raw"}"#,
        "{\"driver\":\"raw\",//c\n\"file.filename\":\"a.raw\"}",
        "{\"driver\":\"raw\",#c\n\"file.filename\":\"a.raw\"}",
        "{\"driver\":\"raw\",\u{c}\"file.filename\":\"a.raw\"}",
        #"{"driver":"raw","file.filename":"a.raw",}"#,
        #"{"driver":"raw","file.filename":"a.raw"}}"#,
        #"{"driver":"raw","file.filename":"a.raw"} x"#, #"{"driver":"raw","file.filename":"a.raw""#,
        #"{driver:"raw","file.filename":"a.raw"}"#,
        #"{"driver":"raw","driver":"raw","file.filename":"a.raw"}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":1e3}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":0.5e1}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":0x400}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":+1024}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":01024}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":-1024}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":1.}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":-}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":99999999999999999999}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":true}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":[1]}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":{"a":1}}"#,
        #"{"driver":"raw","file.filename":"a.raw","size":True}"#,
        #"{"driver":"raw","file.filename":"a\qb"}"#, #"{"driver":"raw","file.filename":"a\u00"}"#,
        #"{"driver":"raw","file.filename":"\ud83d"}"#,
        #"{"driver":"raw","file.filename":"\ude00"}"#,
        #"{"driver":"raw","file.filename":"\uffff"}"#,
        "{\"driver\":\"raw\",\"file.filename\":\"a\tb\"}",
        #"{"driver":"raw","file":{"filename":"a.raw"},"file.driver":"file"}"#,
        #"{"driver":null,"file.filename":"a.raw"}"#,
        #"{"driver":"raw","file.filename":"a.raw","a.":1}"#,
        "[]", "1", #""x""#, "", "{}", "null", #"{"driver":"raw","file":[]}"#, #"{"":"x"}"#,
        #"{"driver":1}"#, #"{"a":[[[[[[[[[[[[]]]]]]]]]]]]}"#,
        "{\"a\":" + String(repeating: "[", count: 5000) + "}",
    ]

    @Test(arguments: texts) func jsonIsTakenAsQemuTakesIt(_ text: String) throws {
        try compareInfo(["json:\(text)"], in: folder.path, at: #_sourceLocation)
    }

    @Test func jsonNamesFilesWithAnyCharacter() throws {
        for (name, written) in [
            ("a'b", #"a\'b"#), ("ä😀", #"\u00e4\ud83d\ude00"#), (#"q"\"#, #"q\"\\"#), ("c%d", "c%d"),
        ] {
            try Qemu.img("create", "-q", "-f", "raw", name, "1M", in: folder.path)
            try compareInfo(
                [#"json:{"driver":"raw","file.filename":"\#(written)"}"#], in: folder.path,
                at: #_sourceLocation)
        }
    }

    static let chains = [
        "driver=qcow2,file.filename=over.qcow2,backing.driver=raw,backing.file.filename=b.raw",
        "driver=qcow2,file.filename=over.qcow2,backing.driver=qcow2,backing.file.filename=b.qcow2",
        "file.filename=over.qcow2,backing.file.filename=b.raw",
        "driver=qcow2,file.filename=over.qcow2,backing.driver=raw",
        "driver=qcow2,file.filename=over.qcow2,backing.driver=raw,backing.offset=512,"
            + "backing.file.filename=a.raw",
        "driver=qcow2,file.filename=alone.qcow2,backing.driver=qcow2,"
            + "backing.file.driver=raw,backing.file.offset=1536,backing.file.file.filename=archive",
        "driver=qcow2,file.filename=alone.qcow2,backing.driver=raw,backing.file.filename=b.raw",
        "driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,"
            + "backing.file.filename=over.qcow2,backing.backing.driver=raw,"
            + "backing.backing.file.filename=b.raw",
        "driver=qcow2,file.filename=top.qcow2,backing.backing.driver=raw,"
            + "backing.backing.file.filename=b.raw",
        "driver=raw,file.filename=a.raw",
    ]

    @Test(arguments: chains) func backingFilesAreThoseDescribed(_ options: String) throws {
        for line in ["map --image-opts", "map --output=json --image-opts", "measure --image-opts"] {
            let theirs = try require("qemu-img", line.words + [options], in: folder.path)
            let own = try run(Swimg.path, line.words + [options], in: folder.path)
            #expect(own.outputText == theirs && own.errors.isEmpty, "\(own)\n\(theirs)")
        }
        for program in ["qemu-img", Swimg.path] {
            try require(
                program,
                ["convert", "--image-opts", "-O", "raw", options]
                    + [program == "qemu-img" ? "theirs" : "own"], in: folder.path)
        }
        let (own, theirs) = (folder.path("own"), folder.path("theirs"))
        #expect(try mismatch(contents(own), contents(theirs)) == nil)
    }

    /// `null` ends the chain at any place of it; so does nothing at all, of which qemu-img warns.
    @Test func aChainCanEndEarly() throws {
        let ends = [
            #"json:{"driver":"qcow2","file.filename":"top.qcow2","backing":null}"#,
            #"json:{"driver":"qcow2","file.filename":"top.qcow2","backing":""}"#,
            #"json:{"driver":"qcow2","file.filename":"top.qcow2","backing":{"backing":null}}"#,
            #"json:{"driver":"qcow2","file.filename":"top.qcow2","backing.backing":null}"#,
            #"json:{"driver":"raw","file.filename":"a.raw","backing":null}"#,
        ]
        for name in ends {
            let theirs = try require("qemu-img", ["map", "--output=json", name], in: folder.path)
            let own = try run(Swimg.path, ["map", "--output=json", name], in: folder.path)
            #expect(own.outputText == theirs && own.errors.isEmpty, "\(own)\n\(theirs)")
        }
    }

    @Test(arguments: [
        "driver=qcow2,file.filename=over.qcow2,backing=x",
        "driver=qcow2,file.filename=over.qcow2,backing.driver=nosuch,backing.file.filename=a.raw",
        "driver=qcow2,file.filename=over.qcow2,backing.file.filename=missing",
        "driver=qcow2,file.filename=over.qcow2,backing.driver=raw,backing=",
        "driver=qcow2,file.filename=alone.qcow2,backing.driver=raw",
        "driver=raw,file.filename=a.raw,backing.driver=raw,backing.file.filename=b.raw",
        "file.filename=a.raw,backing.driver=raw,backing.file.filename=b.raw",
        "driver=qcow2,file.filename=over.qcow2,backing.file.filename=a.raw,backing.nosuch=1",
        "driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,"
            + "backing.file.filename=top.qcow2,backing.backing.file.filename=top.qcow2",
    ])
    func wrongBackingFilesAreRefused(_ options: String) throws {
        let words = ["map", "--image-opts", options]
        let own = try run(Swimg.path, words, in: folder.path)
        #expect(own.status == 1 && own.errorText.filter(\.isNewline).count == 1, "\(own)")
        // The loop is one to swimg only: qemu ends it after some rounds of probing.
        guard !options.contains("top") else { return }
        #expect(try run("qemu-img", words, in: folder.path).status == 1)
    }

    /// Headers can describe a backing file, with backing files of its own.
    @Test func headersDescribeBackingFiles() throws {
        let below = [
            #"json:{"driver":"raw","file":{"driver":"file","filename":"FOLDER/b.raw"}}"#,
            #"json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"FOLDER/a.raw"}}"#,
            #"json:{"driver":"qcow2","file.filename":"FOLDER/over.qcow2","backing":null}"#,
            #"json:{"driver":"qcow2","file":{"driver":"file","filename":"FOLDER/over.qcow2"},"#
                + #""backing":{"driver":"raw","file":{"driver":"file","filename":"FOLDER/b.raw"}}}"#,
        ].map { $0.replacingOccurrences(of: "FOLDER", with: folder.path) }
        for (number, name) in below.enumerated() {
            let image = "image\(number).qcow2"
            let format = name.contains("qcow2") ? "qcow2" : "raw"
            try Qemu.img(
                "create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", format, image, "512k",
                in: folder.path)
            try Qemu.io("qcow2", folder.path(image), ["write -P 4 128k 64k"])
            let theirs = try require("qemu-img", ["map", "--output=json", image], in: folder.path)
            let own = try run(Swimg.path, ["map", "--output=json", image], in: folder.path)
            #expect(own.outputText == theirs && own.errors.isEmpty, "\(own)\n\(theirs)")
            try require(Swimg.path, ["convert", "-O", "raw", image, "own"], in: folder.path)
            try Qemu.img("compare", "-F", "raw", image, "own", in: folder.path)
            try compareInfo([image], in: folder.path, at: #_sourceLocation)
            if number < 2 {
                try compareInfo(["--backing-chain", image], in: folder.path, at: #_sourceLocation)
            }
        }
    }

    /// A description in a header starts nothing, and chooses no keys.
    @Test(arguments: [
        #"json:{"driver":"raw","file":{"filename":"[ nbdkit null ]"}}"#,
        #"json:{"driver":"raw","file":{"filename":"nbds://localhost/"}}"#,
        #"json:{"driver":"qcow2","file.filename":"over.qcow2","backing":{"driver":"raw","#
            + #""file":{"filename":"nbds://localhost/"}}}"#,
    ])
    func headersChooseNoKeys(_ name: String) throws {
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-u", "-b", name, "-F",
            name.contains("over") ? "qcow2" : "raw", "bad.qcow2", "1M", in: folder.path)
        let own = try run(Swimg.path, ["map", "bad.qcow2"], in: folder.path)
        #expect(own.status == 1 && own.errorText.filter(\.isNewline).count == 1, "\(own)")
        #expect(
            own.errorText.contains("not supported") || own.errorText.contains("cannot open"),
            "\(own)")
    }

    /// The list of what an image lies in, as QEMU 8 and later print it (qapi/block-core.json,
    /// BlockGraphInfo).
    @Test func infoHasChildren() throws {
        func node(_ words: [String]) throws -> NSDictionary {
            let text = try require(
                Swimg.path, ["info", "--output=json"] + words, in: folder.path)
            return try #require(
                JSONSerialization.jsonObject(with: Data(text.utf8)) as? NSDictionary)
        }
        func child(_ node: NSDictionary) throws -> NSDictionary {
            let children = try #require(node["children"] as? [NSDictionary])
            try #require(children.count == 1 && children[0]["name"] as? String == "file")
            return try #require(children[0]["info"] as? NSDictionary)
        }
        for name in ["over.qcow2", "a.raw", "./a.raw", "file:a.raw"] {
            let image = try node([name])
            let file = try child(image)
            let path = folder.path(name.replacingOccurrences(of: "file:", with: ""))
            let size = try #require(FileStatus(path)).size
            #expect(file["filename"] as? String == image["filename"] as? String)
            #expect(file["virtual-size"] as? Int64 == (size + 511) / 512 * 512)
            #expect(file["actual-size"] as? Int64 == image["actual-size"] as? Int64)
            #expect(file["format"] as? String == "file" && file["dirty-flag"] as? Bool == false)
            #expect((file["children"] as? [Any])?.isEmpty == true)
            let specific = try #require(file["format-specific"] as? NSDictionary)
            #expect(specific == ["type": "file", "data": [:] as NSDictionary])
        }
        let inArchive = try node([
            #"json:{"driver":"qcow2","file":{"driver":"raw","offset":1536,"#
                + #""file":{"driver":"file","filename":"archive"}}}"#
        ])
        let part = try child(inArchive)
        let (whole, image) = (
            try #require(FileStatus(folder.path("archive"))).size,
            try #require(FileStatus(folder.path("a.qcow2"))).size
        )
        #expect(part["format"] as? String == "raw")
        #expect(
            part["filename"] as? String
                == #"json:{"offset": 1536, "driver": "raw", "file": {"driver": "file", "#
                + #""filename": "archive"}}"#)
        #expect(part["virtual-size"] as? Int64 == (image + 511) / 512 * 512)
        let file = try child(part)
        #expect(file["filename"] as? String == "archive" && file["format"] as? String == "file")
        #expect(file["virtual-size"] as? Int64 == (whole + 511) / 512 * 512)
        let nested = try node([
            "--image-opts", "driver=raw,file.driver=qcow2,file.file.filename=a.qcow2",
        ])
        let name =
            #"json:{"driver": "raw", "file": {"driver": "qcow2", "file": {"driver": "file", "#
            + #""filename": "a.qcow2"}}}"#
        let shown = try Qemu.img(
            "info", "--image-opts", "driver=raw,file.driver=qcow2,file.file.filename=a.qcow2",
            in: folder.path)
        #expect(nested["filename"] as? String == name && shown.contains("image: \(name)\n"))
        let disk = try child(nested)
        #expect(disk["format"] as? String == "qcow2" && disk["virtual-size"] as? Int64 == 524288)
        #expect(try child(disk)["virtual-size"] as? Int64 == (image + 511) / 512 * 512)
        // A storage that is the image itself lies in nothing.
        let alone = try node([#"json:{"driver":"file","filename":"a.raw"}"#])
        #expect((alone["children"] as? [Any])?.isEmpty == true)
    }
}
