import Foundation
import TestSupport
import Testing

/// Refusals of images with data files, and the files that a failure leaves.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct DataFileFailureTests {
    private let folder: TempFolder

    init() throws {
        folder = try TempFolder()
        try DiskSketch("A1-bB2+0C").writeRaw(folder.path("source"))
        try Qemu.img("create", "-q", "-f", "qcow2", "base", "3M", in: folder.path)
    }

    /// Words, status and text equal qemu-img's; no file is left.
    @Test(arguments: [
        "data_file_raw=on", "data_file=data,compat=0.10",
        "data_file=data,compat=v2,cluster_size=4k",
        "data_file=data,data_file_raw=on,backing_file=base,backing_fmt=qcow2",
    ])
    func refusedAsByQemu(_ options: String) throws {
        let line = ["create", "-f", "qcow2", "-o", options, "new", "1M"]
        let theirs = try run("qemu-img", line, in: folder.path)
        let ours = try run(Swimg.path, line, in: folder.path)
        #expect(ours.status == 1 && theirs.status == 1, "\(ours)\n\(theirs)")
        #expect(ours.outputText == theirs.outputText, "\(ours)\n\(theirs)")
        #expect(withoutName(ours) == withoutName(theirs))
        let converted = ["convert", "-f", "raw", "-O", "qcow2", "-o", options, "source", "new"]
        let (own, other) = try (
            run(Swimg.path, converted, in: folder.path), run("qemu-img", converted, in: folder.path)
        )
        #expect(own.status == 1 && withoutName(own) == withoutName(other), "\(own)\n\(other)")
        #expect(folder.names == ["base", "source"], "left behind by \(ours)\n\(own)")
    }

    /// Lines that fail, and words of the message. `link` leads to `new`, which does not exist.
    static let lines = [
        ("-o data_file=new source new", "the image itself"),
        ("-o data_file=./new source new", "the image itself"),
        ("-o data_file=link source new", "the image itself"),
        ("-o data_file=new source link", "the image itself"),
        ("-o data_file=base source base", "the image itself"),
        ("-o data_file=source source new", "it is the source"),
        ("-o data_file=base,backing_file=base,backing_fmt=qcow2 source new", "it is the source"),
        ("-o data_file=sub source new", "sub"), ("-o data_file= source new", "data file"),
        ("-o data_file=nosuch/data source new", "No such file or directory"),
        ("-o data_file=nbd://localhost/x source new", "nbd"),
        ("-c -o data_file=data source new", "Compression"),
        (
            "-o data_file=data,data_file_raw=on -o encrypt.format=luks source new",
            "cannot be encrypted"
        ),
        ("-o data_file=data,data_file_raw=on -B base -F qcow2 source new", "data-file-raw"),
        ("-o data_file=data nosuch new", "No such file or directory"),
        ("-o data_file=data source sub", "sub"),
    ]

    @Test(arguments: lines)
    func refuses(_ line: String, _ word: String) throws {
        _ = try folder.makeFolder("sub")
        try FileManager.default.createSymbolicLink(
            atPath: folder.path("link"), withDestinationPath: "new")
        let names = folder.names
        let before = try ["source", "base"].map { try contents(folder.path($0)) }
        let outcome = try Swimg.convert(
            ["-f", "raw", "-O", "qcow2"] + line.words, in: folder.path)
        #expect(outcome.status == 1 && outcome.output.isEmpty, "\(outcome)")
        #expect(outcome.errorText.filter { $0 == "\n" }.count == 1, "\(outcome)")
        #expect(outcome.errorText.contains(word), "\(outcome)")
        #expect(folder.names == names, "\(outcome)")
        let after = try ["source", "base"].map { try contents(folder.path($0)) }
        #expect(after == before, "\(outcome)")
    }

    /// A conversion whose source, image or data file cannot be read or written any further leaves
    /// what stood under both names.
    @Test(
        .enabled(if: MountedFolder.isUsable, "mounts need root"),
        arguments: ["data", "image"], ["", "data_file_raw=on"])
    func noSpace(_ small: String, _ options: String) throws {
        let mount = try MountedFolder(tmpfs: small == "data" ? 256 << 10 : 48 << 10)
        let places = ["data", "image"].map { ($0 == small ? mount.path : folder.path) + "/" + $0 }
        for place in places { try writeFilled(place, byte: 3, count: 1000) }
        // Tables of small clusters take space, too.
        let all = "cluster_size=512,data_file=\(places[0])" + (options.isEmpty ? "" : "," + options)
        try writeNoise(folder.path("noise"), count: 8 << 20)
        let outcome = try Swimg.convert(
            "-f", "raw", "-O", "qcow2", "-o", all, folder.path("noise"), places[1])
        #expect(outcome.status == 1 && outcome.errorText.contains("space"), "\(outcome)")
        for place in places {
            #expect(try contents(place) == Data(repeating: 3, count: 1000), "\(outcome)")
        }
        #expect(TempFolder.names(in: mount.path) == [small], "\(outcome)")
    }

    /// A damaged source fails in the middle of the work.
    @Test(arguments: ["", "data_file_raw=on"])
    func sourceThatBreaks(_ options: String) throws {
        try Qemu.img("convert", "-O", "qcow2", "source", "broken", in: folder.path)
        let patcher = try Qcow2Patcher(folder.path("broken"))
        try patcher.setWord(patcher.l2Entry(7), 0x7fff_ffff_0000)
        let all = "data_file=data" + (options.isEmpty ? "" : "," + options)
        let words = ["-O", "qcow2", "-o", all, "broken", "new"]
        let first = try Swimg.convert(words, in: folder.path)
        #expect(first.status == 1 && first.errorText.contains("broken"), "\(first)")
        #expect(folder.names == ["base", "broken", "source"], "\(first)")
        for name in ["data", "new"] { try writeFilled(folder.path(name), byte: 5, count: 999) }
        let second = try Swimg.convert(words, in: folder.path)
        #expect(second.status == 1, "\(second)")
        for name in ["data", "new"] {
            #expect(try contents(folder.path(name)) == Data(repeating: 5, count: 999), "\(second)")
        }
    }

    // MARK: Reading

    static let verbs = [
        "map image", "convert -O raw image new", "measure image", "compare image source",
        "digest image", "dd if=image of=new", "resize image 2M",
    ]

    @Test(arguments: verbs, ["gone", "folder", "fifo"])
    func dataFileThatCannotBeRead(_ verb: String, _ state: String) throws {
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "data_file=data", "image", "1M", in: folder.path)
        try FileManager.default.removeItem(atPath: folder.path("data"))
        switch state {
        case "folder": _ = try folder.makeFolder("data")
        case "fifo": try require("mkfifo", [folder.path("data")])
        default: break
        }
        let before = try contents(folder.path("image"))
        let outcome = try run(Swimg.path, verb.words, in: folder.path, timeout: 20)
        #expect(outcome.status == (verb.contains("compare") ? 2 : 1), "\(outcome)")
        #expect(outcome.errorText.filter { $0 == "\n" }.count == 1, "\(outcome)")
        #expect(outcome.errorText.contains("the data file of image"), "\(outcome)")
        #expect(try contents(folder.path("image")) == before)
        #expect(!folder.names.contains("new"), "\(outcome)")
    }

    /// Facts about the data file in the header, changed in a way that qemu refuses as well.
    @Test(arguments: ["no name", "raw without data file", "itself", "offset", "compressed"])
    func damagedHeader(_ damage: String) throws {
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "data_file=datum,data_file_raw=on", "image", "1M",
            in: folder.path)
        let patcher = try Qcow2Patcher(folder.path("image"))
        switch damage {
        case "no name": try patcher.write([1, 2, 3, 4], at: 0x70)
        case "raw without data file": try patcher.setWord(72, 0)
        case "itself": try patcher.write(Array("image".utf8), at: 0x78)
        case "offset": try patcher.change(patcher.l2Entry(3)) { $0 + 65536 }
        default: try patcher.change(patcher.l2Entry(3)) { $0 | 1 << 62 }
        }
        let ours = try Swimg.convert("-O", "raw", "image", "new", in: folder.path)
        #expect(ours.status == 1 && !folder.names.contains("new"), "\(ours)")
        #expect(ours.errorText.filter { $0 == "\n" }.count == 1, "\(ours)")
        guard damage != "itself" else { return }
        let theirs = try run("qemu-img", ["convert", "-O", "raw", "image", "new"], in: folder.path)
        #expect(theirs.status == 1, "\(theirs)")
    }

    /// A name in a header is the path of a file: it starts no server and opens no export.
    @Test(arguments: ["nbd:x:1", "json:{}", "[touch"])
    func namesOutOfHeadersArePaths(_ name: String) throws {
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", "data_file=datafile", "image", "1M",
            in: folder.path)
        let patcher = try Qcow2Patcher(folder.path("image"))
        try patcher.write([UInt8(name.utf8.count)], at: 0x77)
        try patcher.write(Array(name.utf8), at: 0x78)
        let missing = try run(Swimg.path, ["map", "image"], in: folder.path)
        #expect(missing.status == 1 && missing.errorText.contains("No such file"), "\(missing)")
        try FileManager.default.moveItem(
            atPath: folder.path("datafile"), toPath: folder.path(name))
        let found = try run(Swimg.path, ["map", "image"], in: folder.path)
        #expect(found.isSuccess, "\(found)")
    }

    @Test(arguments: [
        ["--image-opts", "driver=qcow2,file.filename=base,data-file.filename=source"],
        ["--image-opts", "driver=raw,file.filename=base,data-file.filename=source"],
        ["--image-opts", "driver=qcow2,file.filename=base,data-file=node"],
        [
            "--image-opts",
            "file.filename=base,data-file.driver=raw,data-file.offset=0,data-file.size=512,"
                + "data-file.file.filename=source",
        ],
    ])
    func descriptionsAreRefused(_ words: [String]) throws {
        let outcome = try Swimg.convert(["-O", "raw"] + words + ["new"], in: folder.path)
        #expect(outcome.status == 1 && outcome.errorText.contains("data-file"), "\(outcome)")
        #expect(outcome.errorText.filter { $0 == "\n" }.count == 1, "\(outcome)")
        let theirs = try run(
            "qemu-img", ["convert", "-O", "raw"] + words + ["new"], in: folder.path)
        #expect(theirs.status == 1 || words[1].contains("size"), "\(theirs)")
    }
}
