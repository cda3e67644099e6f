import Foundation
import TestSupport
import Testing

/// Verbs that change images with data files where they stand. swimg and qemu-img change copies of
/// the same files; relative names of data files count from the working directory.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct DataFileInPlaceTests {
    private let folder: TempFolder

    init() throws { folder = try TempFolder() }

    static let options = [
        "", "data_file_raw=on", "cluster_size=4k", "cluster_size=2M,data_file_raw=on",
        "extended_l2=on", "extended_l2=on,cluster_size=16k,data_file_raw=on",
        "preallocation=metadata,refcount_bits=64",
    ]

    private static let size = 5_242_880 + 512

    /// An image that qemu has filled in part, its last sector too.
    private func make(
        _ name: String, _ options: String, size: Int = Self.size, below: String? = nil,
        byte: Int = 1
    ) throws {
        let all = "data_file=\(name).data" + (options.isEmpty ? "" : "," + options)
        let format = below == "base" ? "raw" : "qcow2"
        let backing = below.map { ["-b", $0, "-F", format] } ?? []
        try require(
            "qemu-img",
            ["create", "-q", "-f", "qcow2", "-o", all] + backing + [name, "\(size)"],
            in: folder.path)
        try Qemu.io(
            "qcow2", name,
            [
                "write -P \(byte) \(byte * 10)k 700k", "write -z 100k 100k",
                "discard 300k 64k", "write -P \(byte + 1) 3M 1M", "write -z -u 3500k 64k",
                "write -P \(byte + 2) \(size - 512) 512",
            ], in: folder.path)
    }

    private func disk(_ folder: TempFolder, _ name: String) throws -> Data {
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", name, "disk", in: folder.path)
        defer { try? FileManager.default.removeItem(atPath: folder.path("disk")) }
        return try contents(folder.path("disk"))
    }

    /// Expects an image to be sound, and to have the same disk, facts and data file as qemu's.
    private func expectSame(_ name: String, _ twins: Twins, _ story: String) throws {
        let (own, theirs) = try (disk(twins.own, name), disk(twins.theirs, name))
        #expect(mismatch(own, theirs) == nil, "\(name): \(story)")
        let check = try run("qemu-img", ["check", "-f", "qcow2", name], in: twins.own.path)
        #expect(check.isSuccess, "\(name): \(story)\n\(check)")
        let facts = try [twins.own, twins.theirs].map {
            let text = try Qemu.img(
                "info", "--output=json", "-f", "qcow2", name, in: $0.path)
            let all = try #require(
                JSONSerialization.jsonObject(with: Data(text.utf8)) as? [String: Any])
            return NSDictionary(dictionary: all.filter { $0.key != "actual-size" })
        }
        #expect(facts[0] == facts[1], "\(name): \(story)")
        let data = "\(name).data"
        guard twins.own.names.contains(data) else { return }
        let isRaw = "\(facts[0])".contains("\"data-file-raw\" = 1")
        if isRaw {
            #expect(try mismatch(contents(twins.own.path(data)), own) == nil, "\(data): \(story)")
        }
        try require("sync", ["-f", twins.own.path, twins.theirs.path])
        let mine = try #require(FileStatus(twins.own.path(data)))
        let other = try #require(FileStatus(twins.theirs.path(data)))
        // swimg's ends with the disk, qemu's may end with the last cluster.
        #expect(mine.size <= other.size, "\(data): \(story)")
        #expect(mine.allocated <= other.allocated + 8192, "\(data): \(story)")
    }

    // MARK: convert -n

    @Test(arguments: options, some(2, of: ["", "-W", "-S 0", "-m 1 -t none"]))
    func converts(_ options: String, _ manner: String) throws {
        try make("image", options)
        let source = DiskSketch("A-0b--2+CD00--EE-a1---", cluster: 200 << 10)
        try source.writeRaw(folder.path("source"))
        let twins = try Twins(copying: folder)
        let line = ["convert", "-n", "-f", "raw", "-O", "qcow2"] + manner.words
        let outcome = try twins.run(line + ["source", "image"])
        try expectSame("image", twins, "\(outcome)")
        let after = try disk(folder, "image")
        #expect(mismatch(after.prefix(source.size), source.bytes) == nil, "\(outcome)")
    }

    /// The image shows its backing file where nothing was written.
    @Test(arguments: ["", "cluster_size=4k", "extended_l2=on"])
    func convertsOverABackingFile(_ options: String) throws {
        try writeFilled(folder.path("base"), byte: 9, count: 4 << 20)
        try make("image", options, below: "base")
        try make("source", "", size: 5 << 20, below: "base", byte: 4)
        let twins = try Twins(copying: folder)
        for backing in [[], ["-B", "base", "-F", "raw"]] {
            let line = ["convert", "-n", "-f", "qcow2", "-O", "qcow2"] + backing
            let outcome = try twins.run(line + ["source", "image"])
            try expectSame("image", twins, "\(outcome)")
        }
    }

    /// Clusters are written whole, and their zeros take no space.
    @Test(arguments: ["", "data_file_raw=on"])
    func zerosInClustersTakeNoSpace(_ options: String) throws {
        let all = "data_file=image.data,cluster_size=2M" + (options.isEmpty ? "" : "," + options)
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", all, "image", "8M", in: folder.path)
        try DiskSketch("1---2-----3--", cluster: 512 << 10).writeRaw(folder.path("source"))
        let twins = try Twins(copying: folder)
        try twins.run(["convert", "-n", "-f", "raw", "-O", "qcow2", "source", "image"])
        try expectSame("image", twins, options)
    }

    /// Single requests, within clusters and over them.
    @Test(arguments: Self.options) func bench(_ options: String) throws {
        try make("image", options)
        let twins = try Twins(copying: folder)
        let words = "bench -w -c 60 -S 90000 -s 1536 --pattern=7 image".words
        let other = try run("qemu-img", words, in: twins.theirs.path)
        let outcome = try run(Swimg.path, words, in: twins.own.path)
        #expect(other.isSuccess && outcome.isSuccess, "\(outcome)\n\(other)")
        try expectSame("image", twins, options)
    }

    /// Images that cannot be written into are left as they were.
    @Test(arguments: [
        ("-c source image", "Compression"), ("image.data image", "the source"),
        ("source short", "smaller"), ("source lost", "lost.data"),
        ("source itself", "itself"),
    ])
    func refuses(_ line: String, _ word: String) throws {
        try writeFilled(folder.path("source"), byte: 7, count: 1 << 20)
        try make("image", "", size: 5 << 20)
        for name in ["short", "lost", "itself"] {
            let size = name == "short" ? "512k" : "2M"
            try Qemu.img(
                "create", "-q", "-f", "qcow2", "-o", "data_file=\(name).data", name, size,
                in: folder.path)
        }
        try FileManager.default.removeItem(atPath: folder.path("lost.data"))
        let patcher = try Qcow2Patcher(folder.path("itself"))
        try patcher.write([6], at: 0x77)
        try patcher.write(Array("itself".utf8), at: 0x78)
        let before = try folder.names.map { try contents(folder.path($0)) }
        let outcome = try Swimg.convert(
            ["-n", "-f", "raw", "-O", "qcow2"] + line.words, in: folder.path)
        #expect(outcome.status == 1 && outcome.errorText.contains(word), "\(outcome)")
        #expect(outcome.errorText.filter { $0 == "\n" }.count == 1, "\(outcome)")
        #expect(try folder.names.map { try contents(folder.path($0)) } == before, "\(outcome)")
    }

    /// A described data file takes the place of the one in the header.
    @Test func describedDataFile() throws {
        try make("image", "")
        try writeFilled(folder.path("source"), byte: 7, count: 1 << 20)
        try FileManager.default.moveItem(
            atPath: folder.path("image.data"), toPath: folder.path("moved"))
        let name = #"json:{"file.filename":"image","data-file.filename":"moved"}"#
        let twins = try Twins(copying: folder)
        try twins.run(["convert", "-n", "-f", "raw", "-O", "qcow2", "source", name])
        for verb in [["amend", "-o", "size=6M", name], ["bitmap", "--add", name, "b"]] {
            try twins.run(verb)
        }
        #expect(try disk(folder, name) == disk(twins.theirs, name))
        #expect(folder.names == twins.theirs.names)
    }

    // MARK: commit

    /// Any images of a chain have data files.
    @Test(
        arguments: ["top", "mid", "base", "top mid", "top mid base"],
        some(2, of: ["", "-d", "-b low", "-b mid"]))
    func commits(_ external: String, _ manner: String) throws {
        for (name, below) in [("low", nil), ("mid", "low"), ("top", "mid")] as [(String, String?)] {
            let size = name == "top" ? Self.size : 4 << 20
            let number = name == "low" ? 1 : name == "mid" ? 3 : 6
            let isExternal = external.words.contains(name == "low" ? "base" : name)
            let options = name == "mid" ? "cluster_size=16k" : ""
            if isExternal {
                try make(name, options, size: size, below: below, byte: number)
            } else {
                let backing = below.map { ["-b", $0, "-F", "qcow2"] } ?? []
                try require(
                    "qemu-img", ["create", "-q", "-f", "qcow2"] + backing + [name, "\(size)"],
                    in: folder.path)
                try Qemu.io(
                    "qcow2", name,
                    ["write -P \(number) \(number * 50)k 300k", "write -z 2M 70k"],
                    in: folder.path)
            }
        }
        let twins = try Twins(copying: folder)
        let story = "\(external): commit \(manner)"
        try twins.run(["commit", "-f", "qcow2"] + manner.words + ["top"], story)
        for name in ["top", "mid", "low"] { try expectSame(name, twins, story) }
    }

    /// The base is the disk of a raw data file, and grows.
    @Test(arguments: ["", "cluster_size=4k", "extended_l2=on"])
    func commitsIntoARawDataFile(_ options: String) throws {
        let all = "data_file_raw=on" + (options.isEmpty ? "" : "," + options)
        try make("low", all, size: 4 << 20)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "low", "-F", "qcow2", "top", "\(Self.size)",
            in: folder.path)
        try Qemu.io(
            "qcow2", "top", ["write -P 7 200k 300k", "write -z 3M 300k", "write -P 8 4500k 9k"],
            in: folder.path)
        let twins = try Twins(copying: folder)
        try twins.run(["commit", "top"])
        for name in ["top", "low"] { try expectSame(name, twins, options) }
    }

    // MARK: rebase

    @Test(
        arguments: ["", "cluster_size=4k", "extended_l2=on"],
        ["-b other -F qcow2", "-b base -F raw", "-b  ", "-u -b base -F raw", "-c -b "])
    func rebases(_ options: String, _ manner: String) throws {
        try writeFilled(folder.path("base"), byte: 9, count: 4 << 20)
        try make("mid", "", size: 4 << 20, below: "base", byte: 4)
        try make("other", "cluster_size=16k", size: 6 << 20, below: "base", byte: 5)
        try make("top", options, below: "mid")
        let twins = try Twins(copying: folder)
        let words = manner.split(separator: " ", omittingEmptySubsequences: true).map(String.init)
        let line = ["rebase", "-f", "qcow2"] + words + (words.last == "-b" ? [""] : []) + ["top"]
        if manner.hasPrefix("-c") {
            let outcome = try run(Swimg.path, line, in: folder.path)
            #expect(outcome.status == 1 && outcome.errorText.contains("data file"), "\(outcome)")
            return
        }
        let outcome = try twins.run(line)
        try expectSame("top", twins, "\(outcome)")
    }

    /// A raw data file holds all of the disk.
    @Test(arguments: ["-u -b base -F raw top", "-b base -F raw top", "-b base top"])
    func rawDataFilesHaveNoBackingFile(_ line: String) throws {
        try writeFilled(folder.path("base"), byte: 9, count: 4 << 20)
        try make("top", "data_file_raw=on")
        let twins = try Twins(copying: folder)
        let theirs = try run("qemu-img", ["rebase"] + line.words, in: twins.theirs.path)
        let ours = try run(Swimg.path, ["rebase"] + line.words, in: folder.path)
        #expect(ours.status == theirs.status && ours.status == 1)
        #expect(withoutName(ours) == withoutName(theirs))
        try expectSame("top", twins, line)
    }

    // MARK: amend, bitmap, snapshot

    @Test(
        arguments: some(
            of: [
                "data_file=moved", "data_file=", "data_file_raw=off", "data_file_raw=on",
                "data_file=moved,data_file_raw=off,size=6M", "size=6M", "size=5242880",
                "compat=0.10", "compat=0.10,refcount_bits=16", "refcount_bits=1",
                "refcount_bits=64", "lazy_refcounts=on,refcount_bits=8", "data_file=nosuch",
                "backing_file=x",
            ], with: ["", "data_file_raw=on"]))
    func amends(_ change: String, _ options: String) throws {
        try make("image", options)
        try Qemu.img("bitmap", "--add", "image", "b", in: folder.path)
        let twins = try Twins(copying: folder)
        let theirs = try run("qemu-img", ["amend", "-o", change, "image"], in: twins.theirs.path)
        let ours = try run(Swimg.path, ["amend", "-o", change, "image"], in: folder.path)
        #expect(ours.status == theirs.status, "\(ours)\n\(theirs)")
        #expect(
            withoutName(ours).hasPrefix(withoutName(theirs).prefix { $0 != "\n" }),
            "\(ours)\n\(theirs)")
        if change.contains("data_file=moved") {
            for folder in [twins.own, twins.theirs] {
                try FileManager.default.moveItem(
                    atPath: folder.path("image.data"), toPath: folder.path("moved"))
            }
        }
        if change == "data_file=" || change == "data_file=nosuch" {
            let (own, other) = try (infoAnyway(folder), infoAnyway(twins.theirs))
            #expect(own == other)
        } else {
            try expectSame("image", twins, "\(options) \(change)")
        }
    }

    /// The facts of an image whose data file is at its old place.
    private func infoAnyway(_ folder: TempFolder) throws -> String {
        let image = "driver=qcow2,file.filename=image,data-file.filename=image.data"
        let text = try Qemu.img("info", "--image-opts", image, in: folder.path)
        return text.split(separator: "\n").filter { !$0.hasPrefix("disk size") }
            .joined(separator: "\n")
    }

    @Test(arguments: ["", "data_file_raw=on"])
    func bitmaps(_ options: String) throws {
        try make("image", options)
        try writeFilled(folder.path("source"), byte: 7, count: 1 << 20)
        let twins = try Twins(copying: folder)
        for line in [
            "bitmap --add -g 64k image one", "bitmap --add --disable image two",
            "convert -n -f raw -O qcow2 source image", "bitmap --merge one image two",
            "bitmap --remove image one", "resize image 6M",
        ] {
            let outcome = try twins.run(line.words)
            try expectSame("image", twins, "\(outcome)")
        }
        let text = try Qemu.img("info", "image", in: folder.path)
        #expect(text.contains("name: two"), "\(text)")
    }

    @Test(arguments: ["-c s", "-a s", "-d s", "-l"])
    func snapshotsAreRefused(_ line: String) throws {
        try make("image", "")
        let twins = try Twins(copying: folder)
        let theirs = try run("qemu-img", ["snapshot"] + line.words + ["image"], in: folder.path)
        let ours = try run(Swimg.path, ["snapshot"] + line.words + ["image"], in: folder.path)
        #expect(ours.status == theirs.status && ours.output == theirs.output, "\(ours)\n\(theirs)")
        #expect(withoutName(ours) == withoutName(theirs))
        try expectSame("image", twins, line)
    }

    // MARK: Crashes

    /// A conversion that fails or is killed at any write leaves a valid image, with old or new
    /// bytes.
    @Test(
        .enabled(if: canTraceSystemCalls, "strace ends it at a certain write"),
        arguments: ["cluster_size=4k", "cluster_size=4k,data_file_raw=on"])
    func convertingKilledAnywhere(_ options: String) throws {
        try make("image", options)
        let source = DiskSketch("A-0b--2+CD00--EE-a1---", cluster: 200 << 10)
        try source.writeRaw(folder.path("source"))
        let before = try disk(folder, "image")
        let new = Data(source.bytes) + before.dropFirst(source.size)
        let line = ["convert", "-n", "-f", "raw", "-O", "qcow2", "-t", "writeback"]
        try disturb(line + ["source", "image"], in: folder, at: 1...12) { copy, outcome in
            #expect(try Qemu.errors("image", in: copy.path) == nil, "\(outcome)")
            let after = try disk(copy, "image")
            #expect(after.count == before.count)
            // The tables can lag behind a raw data file.
            let data = try options.contains("raw") ? contents(copy.path("image.data")) : after
            let wrong = stride(from: 0, to: after.count, by: 512).first { start in
                [after, data].contains {
                    let sector = $0[start..<start + 512]
                    return sector != before[sector.indices] && sector != new[sector.indices]
                }
            }
            #expect(wrong == nil, "\(outcome)")
        }
    }

    @Test(.enabled(if: canTraceSystemCalls, "strace ends it at a certain write"))
    func committingKilledAnywhere() throws {
        try make("low", "cluster_size=4k", size: 4 << 20)
        try make("top", "cluster_size=4k", below: "low", byte: 5)
        let before = try disk(folder, "top")
        try disturb(["commit", "top"], in: folder, at: 1...14) { copy, outcome in
            for name in ["low", "top"] {
                let errors = try Qemu.errors(name, in: copy.path)
                #expect(errors == nil, "\(outcome)")
            }
            #expect(try mismatch(disk(copy, "top"), before) == nil, "\(outcome)")
        }
    }
}
