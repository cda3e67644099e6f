import Foundation
import TestSupport
import Testing

/// Images whose data lies in a file of its own (`data_file=`). swimg and qemu-img run the same
/// commands in two folders, because relative names of data files count from the working directory.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct DataFileTests {
    private let folder: TempFolder
    private let own: String
    private let theirs: String
    private let disk = DiskSketch.oddlySized

    init() throws {
        folder = try TempFolder()
        own = try folder.makeFolder("own")
        theirs = try folder.makeFolder("theirs")
        try disk.writeRaw(folder.path("source"))
    }

    static let options = some(
        6,
        of: [
            "", "data_file_raw=on", "cluster_size=4k", "cluster_size=2M,data_file_raw=on",
            "cluster_size=512,refcount_bits=1", "preallocation=metadata", "preallocation=falloc",
            "preallocation=full,data_file_raw=on", "lazy_refcounts=on,data_file_raw=on",
            "extended_l2=on", "extended_l2=on,data_file_raw=on",
            "extended_l2=on,cluster_size=16k,preallocation=metadata", "compression_type=zstd",
        ])

    static let few = some(
        3,
        of: [
            "", "data_file_raw=on", "cluster_size=4k", "extended_l2=on", "preallocation=metadata",
            "extended_l2=on,cluster_size=16k,preallocation=metadata",
        ])

    // MARK: Writing

    @Test(arguments: some(of: options, with: ["", "-W", "-S 0", "-m 1 --no-clone", "-t none"]))
    func converts(_ options: String, _ manner: String) throws {
        let line =
            manner.words + ["-f", "raw", "-O", "qcow2", "-o", all(options), "../source", "image"]
        let outcome = try Swimg.convert(line, in: own)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        try require(
            "qemu-img", ["convert"] + line.filter { $0 != "--no-clone" }, in: theirs)
        let compared = try run(
            "qemu-img", ["compare", "-f", "raw", "-F", "qcow2", "../source", "image"], in: own)
        #expect(compared.isSuccess, "\(outcome)\n\(compared)")
        let check = try run("qemu-img", ["check", "image"], in: own)
        #expect(check.isSuccess, "\(outcome)\n\(check)")
        // Whatever the options, the data file is the disk.
        #expect(try mismatch(contents(own + "/data"), disk.bytes) == nil, "\(outcome)")
        #expect(try infoHere(own) == infoHere(theirs), "\(outcome)")
        #expect(TempFolder.names(in: own) == ["data", "image"], "\(outcome)")
        // Of units that are shorter than 4 KiB, qemu-img stores some zeros.
        guard !options.contains("extended"), !options.contains("=512") else { return }
        for form in ["json", "human"] {
            let map = ["map", "--output=\(form)", "image"]
            let answers = try (run("qemu-img", map, in: own), run("qemu-img", map, in: theirs))
            #expect(
                withoutChildren(answers.0.outputText) == answers.1.outputText, "\(outcome)")
        }
    }

    /// Not of files that are to take all their space: qemu-img gives some of it back.
    @Test(arguments: options.filter { !$0.contains("falloc") && !$0.contains("full") })
    func takesNoMoreThanQemu(_ options: String) throws {
        let line = [
            "convert", "-f", "raw", "-O", "qcow2", "-o", all(options), "../source", "image",
        ]
        try require(Swimg.path, line, in: own)
        try require("qemu-img", line, in: theirs)
        try require("sync", ["-f", own, theirs])
        for name in ["data", "image"] {
            let mine = try #require(FileStatus("\(own)/\(name)")).allocated
            let other = try #require(FileStatus("\(theirs)/\(name)")).allocated
            let subclusters: Int64 = options.contains("extended") && name == "data" ? 2 << 20 : 0
            #expect(mine <= other + subclusters + 2 * 4096, "\(options) \(name): \(mine), \(other)")
        }
    }

    /// The source lies on a backing file, and the target gets the same one.
    @Test(arguments: ["", "cluster_size=4k", "extended_l2=on"])
    func convertsOverABackingFile(_ options: String) throws {
        let base = folder.path("source")
        let over = folder.path("over")
        try Qemu.img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", over)
        try Qemu.io("qcow2", over, ["write -P 9 64k 200k", "write -z 1M 300k"])
        let line =
            ["-f", "qcow2", "-O", "qcow2", "-o", all(options), "-B", base, "-F", "raw", over]
            + ["image"]
        let outcome = try Swimg.convert(line, in: own)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        let compared = try run("qemu-img", ["compare", over, "image"], in: own)
        #expect(compared.isSuccess, "\(outcome)\n\(compared)")
        #expect(try run("qemu-img", ["check", "image"], in: own).isSuccess, "\(outcome)")
        let map = try Qemu.img("map", "image", in: own)
        #expect(map.contains(base) && map.contains("data\n"), "\(map)")
    }

    @Test(arguments: options, ["1M", "1000448", "0"])
    func creates(_ options: String, _ size: String) throws {
        let line = ["create", "-f", "qcow2", "-o", all(options), "image", size]
        let answers = try (run(Swimg.path, line, in: own), run("qemu-img", line, in: theirs))
        #expect(
            withoutChildren(answers.0.outputText) == answers.1.outputText && answers.0.isSuccess)
        #expect(try infoHere(own) == infoHere(theirs), "\(answers.0)")
        #expect(try run("qemu-img", ["check", "image"], in: own).isSuccess, "\(answers.0)")
        let length = try #require(FileStatus(own + "/data")).size
        let bytes = try #require(size == "1M" ? 1 << 20 : Int64(size))
        #expect(length == bytes, "\(answers.0)")
        // A raw data file is shown even if the guest has written nothing.
        if !options.contains("extended") {
            let maps = try (
                Qemu.img("map", "--output=json", "image", in: own),
                Qemu.img("map", "--output=json", "image", in: theirs)
            )
            #expect(maps.0 == maps.1, "\(answers.0)")
        }
        guard bytes > 0 else { return }
        // qemu writes to it, and swimg reads that.
        try Qemu.io("qcow2", "image", ["write -P 5 3k 100k", "write -z 64k 1k"], in: own)
        let back = try Swimg.convert("-O", "raw", "image", "back", in: own)
        #expect(back.isSuccess, "\(back)")
        try require("qemu-img", ["compare", "-F", "raw", "image", "back"], in: own)
        if options.contains("data_file_raw") {
            #expect(try mismatch(contents(own + "/data"), contents(own + "/back")) == nil)
        }
    }

    /// A file that a data file replaces keeps its mode, and what it held is gone.
    @Test func existingDataFile() throws {
        try writeFilled(own + "/data", byte: 7, count: 20 << 20)
        try FileManager.default.setAttributes(
            [.posixPermissions: 0o640], ofItemAtPath: own + "/data")
        let outcome = try Swimg.convert(
            "-f", "raw", "-O", "qcow2", "-o", all("data_file_raw=on"), "../source", "image",
            in: own)
        #expect(outcome.isSuccess, "\(outcome)")
        #expect(try mismatch(contents(own + "/data"), disk.bytes) == nil, "\(outcome)")
        #expect((FileStatus(own + "/data")?.mode ?? 0) & 0o777 == 0o640)
    }

    /// A device as the data file: it is larger than the disk and holds other bytes.
    @Test(
        .enabled(if: LoopDevice.isUsable, "loop devices need root"),
        arguments: ["", "data_file_raw=on", "preallocation=metadata"])
    func device(_ options: String) throws {
        let device = try LoopDevice(size: 16 << 20, sectorSize: 512, fill: 0x77)
        let data = all(options).replacingOccurrences(of: "=data", with: "=" + device.path)
        let outcome = try Swimg.convert(
            "-f", "raw", "-O", "qcow2", "-o", data, "../source", "image", in: own)
        #expect(outcome.isSuccess, "\(outcome)")
        let compared = try run(
            "qemu-img", ["compare", "-f", "raw", "-F", "qcow2", "../source", "image"], in: own)
        #expect(compared.isSuccess, "\(outcome)\n\(compared)")
        let rest = try contents(device.path, at: Int64(disk.size), count: 4096)
        #expect(rest.allSatisfy { $0 == 0x77 }, "written behind the disk: \(outcome)")
    }

    // MARK: Reading

    /// An image that qemu wrote, with zeros and discarded clusters.
    private func writeTheirs(_ options: String) throws {
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", all(options), "image", "5M", in: theirs)
        try Qemu.io(
            "qcow2", "image",
            [
                "write -P 1 0 300k", "write -P 2 1M 1M", "write -z 64k 100k", "discard 1200k 200k",
                "write -P 3 4M 1000", "write -z -u 1900k 64k", "write -P 4 5242368 512",
            ], in: theirs)
    }

    static let verbs = [
        "info", "info --output=json", "map", "map --output=json", "check", "check --output=json",
        "measure -O raw", "measure -O qcow2", "measure -O qcow2 -o cluster_size=4k",
        "measure -O qcow2 -o data_file=other,data_file_raw=on",
        "compare -F raw", "compare -s -F raw", "compare -F qcow2", "compare -s -F qcow2",
    ]

    @Test(arguments: few, verbs)
    func answersAsQemuDoes(_ options: String, _ verb: String) throws {
        try writeTheirs(options)
        try Qemu.img("convert", "-O", "raw", "image", "copy", in: theirs)
        let other = verb.contains("-F raw") ? ["copy"] : verb.contains("compare") ? ["image"] : []
        let line = verb.words + ["image"] + other
        let answers = try (run(Swimg.path, line, in: theirs), run("qemu-img", line, in: theirs))
        #expect(answers.0.status == answers.1.status, "\(answers.0)\n\(answers.1)")
        // Where a range begins means nothing to `compare -s`.
        if !verb.contains("-s -F raw") {
            #expect(
                withoutChildren(answers.0.outputText) == answers.1.outputText,
                "\(answers.0)\n\(answers.1)")
        }
        #expect(answers.0.errors.isEmpty == answers.1.errors.isEmpty, "\(answers.0)\n\(answers.1)")
    }

    @Test(arguments: options)
    func readsWhatQemuWrote(_ options: String) throws {
        try writeTheirs(options)
        try Qemu.img("convert", "-O", "raw", "image", "copy", in: theirs)
        for line in ["-O raw", "-O raw -S 0 -W", "-O qcow2", "-O qcow2 -c", "-O raw --no-clone"] {
            let outcome = try Swimg.convert(line.words + ["image", "target"], in: theirs)
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
            let compared = try run(
                "qemu-img", ["compare", "-f", "raw", "copy", "target"], in: theirs)
            #expect(compared.isSuccess, "\(outcome)\n\(compared)")
        }
        let digest = try require(Swimg.path, ["digest", "image"], in: theirs)
        #expect(digest.hasPrefix(try blkhash(theirs + "/copy")), "\(digest)")
        let dd = ["dd", "-O", "raw", "bs=64k", "skip=2", "count=30", "if=image"]
        try require(Swimg.path, dd + ["of=a"], in: theirs)
        try require("qemu-img", dd + ["of=b"], in: theirs)
        #expect(try mismatch(contents(theirs + "/a"), contents(theirs + "/b")) == nil)
    }

    /// The option `data-file` takes the place of the name in the header.
    @Test(arguments: [
        ["--image-opts", "driver=qcow2,file.filename=image,data-file.filename=moved"],
        ["--image-opts", "file.filename=image,data-file.driver=file,data-file.filename=moved"],
        [
            "--image-opts",
            "file.filename=image,data-file.driver=raw,data-file.file.filename=moved",
        ],
        [
            """
            json:{"driver":"qcow2","file":{"driver":"file","filename":"image"},\
            "data-file":{"driver":"file","filename":"moved"}}
            """
        ],
    ])
    func describedDataFile(_ words: [String]) throws {
        try writeTheirs("")
        try FileManager.default.moveItem(atPath: theirs + "/data", toPath: theirs + "/moved")
        for verb in ["map", "measure -O raw", "info"] {
            let line = verb.words + words
            let answers = try (run(Swimg.path, line, in: theirs), run("qemu-img", line, in: theirs))
            #expect(
                withoutChildren(answers.0.outputText) == answers.1.outputText && answers.0.isSuccess
            )
        }
        try require("qemu-img", ["convert", "-O", "raw"] + words + ["copy"], in: theirs)
        let outcome = try Swimg.convert(["-O", "raw"] + words + ["target"], in: theirs)
        #expect(outcome.isSuccess, "\(outcome)")
        #expect(try mismatch(contents(theirs + "/copy"), contents(theirs + "/target")) == nil)
    }

    /// A backing file that keeps its data elsewhere.
    @Test func asABackingFile() throws {
        try writeTheirs("")
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "image", "-F", "qcow2", "over", in: theirs)
        try Qemu.io("qcow2", "over", ["write -P 8 200k 1M"], in: theirs)
        for line in [["map", "over"], ["map", "--output=json", "over"], ["measure", "over"]] {
            let answers = try (run(Swimg.path, line, in: theirs), run("qemu-img", line, in: theirs))
            #expect(
                withoutChildren(answers.0.outputText) == answers.1.outputText, "\(answers)")
        }
        try Qemu.img("convert", "-O", "raw", "over", "copy", in: theirs)
        try require(Swimg.path, ["convert", "-O", "raw", "over", "target"], in: theirs)
        #expect(try mismatch(contents(theirs + "/copy"), contents(theirs + "/target")) == nil)
    }

    private func all(_ options: String) -> String {
        options.isEmpty ? "data_file=data" : "data_file=data,\(options)"
    }

    private func infoHere(_ folder: String) throws -> NSDictionary {
        try info(folder + "/image", "qcow2")
    }
}
