import Foundation
import TestSupport
import Testing

/// Images described by options: `json:{…}` and `--image-opts`, as oVirt and Proxmox pass them.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct DescriptionTests {
    let folder: TempFolder

    init() throws {
        folder = try TempFolder()
        try DiskSketch("A1b0+-CC", cluster: 65536).writeRaw(folder.path("a.raw"))
        try Qemu.img("convert", "-O", "qcow2", "a.raw", "a.qcow2", in: folder.path)
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-b", "a.raw", "-F", "raw", "over.qcow2",
            in: folder.path)
        try Qemu.io("qcow2", folder.path("over.qcow2"), ["write -P 9 64k 64k"])
        // A disk inside an archive starts at an offset, as in an OVA.
        let image = try Data(contentsOf: URL(fileURLWithPath: folder.path("a.qcow2")))
        try Qemu.img("create", "-q", "-f", "qcow2", "outer.qcow2", "2M", in: folder.path)
        try Qemu.img(
            "convert", "-n", "-f", "raw", "-O", "qcow2", "over.qcow2", "outer.qcow2",
            in: folder.path)
        let archive = Data(repeating: 0x55, count: 1536) + image + Data(repeating: 0x66, count: 700)
        try archive.write(to: URL(fileURLWithPath: folder.path("archive")))
    }

    static let inArchive = """
        json:{"driver":"qcow2","file":{"driver":"raw","offset":1536,"size":SIZE,\
        "file":{"driver":"file","filename":"archive"}}}
        """

    @Test(arguments: [
        ["json:{\"driver\":\"raw\",\"offset\":512,\"size\":1024,\"file.filename\":\"a.raw\"}"],
        ["json:{\"driver\":\"raw\",\"offset\":\"65536\",\"file\":{\"filename\":\"a.raw\"}}"],
        ["json:{\"driver\":\"qcow2\",\"backing\":null,\"file.filename\":\"over.qcow2\"}"],
        ["json:{\"driver\":\"qcow2\",\"file.filename\":\"over.qcow2\",\"lazy-refcounts\":true}"],
        ["json:{\"file.filename\":\"over.qcow2\",\"read-only\":true}"],
        ["json:{\"driver\":\"file\",\"filename\":\"over.qcow2\"}"],
        ["--image-opts", "driver=qcow2,file.driver=file,file.filename=over.qcow2"],
        ["--image-opts", "file.filename=over.qcow2,file.locking=off,file.cache.direct=off"],
        ["--image-opts", "driver=raw,size=64k,file.filename=a.qcow2"],
        [inArchive],
        [#"json:{"driver":"raw","size":null,"file.filename":"a.raw","file":null}"#],
        ["--image-opts", "driver=raw,file.driver=qcow2,file.file.filename=over.qcow2"],
        ["--image-opts", "driver=raw,file.driver=qcow2,file.file.filename=over.qcow2,offset=96k"],
        [
            #"json:{"driver":"raw","size":131072,"file":{"driver":"qcow2","backing":null,"#
                + #""file.filename":"over.qcow2"}}"#
        ],
        [
            #"json:{"driver":"qcow2","file":{"driver":"qcow2","file":{"driver":"file","#
                + #""filename":"outer.qcow2"}}}"#
        ],
        [
            #"json:{"driver":"qcow2","file":{"driver":"raw","size":1048576,"file":{"driver":"qcow2","#
                + #""file":{"driver":"file","filename":"outer.qcow2"}}}}"#
        ],
    ])
    func readsWhatQemuReads(_ words: [String]) throws {
        let size = try contents(folder.path("a.qcow2")).count
        let words = words.map { $0.replacingOccurrences(of: "SIZE", with: String(size)) }
        try require("qemu-img", ["convert", "-O", "raw"] + words + ["theirs"], in: folder.path)
        let outcome = try Swimg.convert(["-O", "raw"] + words + ["own"], in: folder.path)
        expectSuccess(outcome)
        let theirs = try contents(folder.path("theirs"))
        #expect(!theirs.isEmpty)
        #expect(try mismatch(contents(folder.path("own")), theirs) == nil, "\(outcome)")
    }

    @Test(arguments: [
        ["json:{bad"], ["json:[]"], ["json:{}"], ["json:{\"driver\":\"raw\",\"file\":\"node\"}"],
        ["json:{\"driver\":\"nonesuch\",\"file.filename\":\"a.raw\"}"],
        ["json:{\"driver\":\"raw\",\"wrong\":1,\"file.filename\":\"a.raw\"}"],
        ["json:{\"driver\":\"raw\",\"offset\":99999999,\"file.filename\":\"a.raw\"}"],
        ["json:{\"driver\":\"raw\",\"offset\":512,\"size\":524288,\"file.filename\":\"a.raw\"}"],
        ["--image-opts", "driver=raw,size=1000,file.filename=a.raw"],
        ["--image-opts", "a.raw"], ["--image-opts", "driver=raw"],
        ["--image-opts", "driver=nbd,export=x"],
    ])
    func refusesWhatQemuRefuses(_ words: [String]) throws {
        let theirs = try run(
            "qemu-img", ["convert", "-O", "raw"] + words + ["theirs"], in: folder.path)
        #expect(theirs.status == 1, "\(theirs)")
        let outcome = try Swimg.convert(["-O", "raw"] + words + ["own"], in: folder.path)
        expectRefusal(outcome)
        #expect(!folder.names.contains("own"))
    }

    @Test func writesIntoADescribedTarget() throws {
        let size = try contents(folder.path("a.raw")).count
        for words in [
            ["--target-image-opts", "a.qcow2", "driver=raw,file.filename=own"],
            ["-O", "raw", "a.qcow2", "json:{\"driver\":\"raw\",\"file.filename\":\"own\"}"],
        ] {
            try Data(repeating: 0xaa, count: size).write(
                to: URL(fileURLWithPath: folder.path("own")))
            expectSuccess(try Swimg.convert(["-n"] + words, in: folder.path))
            try Qemu.img("compare", "-f", "raw", "-F", "raw", "a.raw", "own", in: folder.path)
        }
    }

    /// So must none of the files that a disk is read from, if the source lies in that disk.
    @Test(arguments: ["over.qcow2", "a.raw"])
    func whatADiskIsReadFromIsProtected(_ target: String) throws {
        let outcome = try Swimg.convert(
            "-O", "raw", "--image-opts",
            "driver=raw,file.driver=qcow2,file.file.filename=over.qcow2",
            target, in: folder.path)
        expectRefusal(outcome, says: "is the source")
    }

    /// An archive that contains the source must not be overwritten as the target.
    @Test func aSourceInAnArchiveIsProtected() throws {
        let outcome = try Swimg.convert(
            "-O", "raw", "json:{\"driver\":\"raw\",\"offset\":512,\"file.filename\":\"archive\"}",
            "archive", in: folder.path)
        expectRefusal(outcome, says: "is the source")
    }
}
