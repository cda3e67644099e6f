import Foundation
import TestSupport
import Testing

/// swimg and qemu-img resize images with data files, in two folders.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct DataFileResizeTests {
    private let folder: TempFolder
    private let own: String
    private let theirs: String

    init() throws {
        folder = try TempFolder()
        own = try folder.makeFolder("own")
        theirs = try folder.makeFolder("theirs")
    }

    static let options = some(
        3,
        of: [
            "", "data_file_raw=on", "cluster_size=4k,data_file_raw=on", "cluster_size=512",
            "extended_l2=on", "extended_l2=on,cluster_size=16k,data_file_raw=on",
            "preallocation=metadata",
        ])

    static let ways = [
        ["1000448"], ["+512", "+70k"], ["20M"], ["--shrink 500k", "+300k"],
        ["--shrink -512", "+1M"], ["--shrink 512", "9M"], ["--preallocation=metadata 9M"],
        ["--preallocation=falloc +7M"], ["--preallocation=full 5M", "--shrink 700k", "8M"],
        ["60M", "--shrink 1M"],
    ]

    /// 1,000,448 bytes: not the end of a cluster.
    private func make(_ options: String, in place: String, _ more: [String] = []) throws {
        let all = options.isEmpty ? "data_file=data" : "data_file=data,\(options)"
        try require(
            "qemu-img", ["create", "-q", "-f", "qcow2", "-o", all] + more + ["image", "1000448"],
            in: place)
        try Qemu.io(
            "qcow2", "image", ["write -P 1 0 1000448", "write -z 64k 64k", "discard 256k 64k"],
            in: place)
    }

    @Test(arguments: some(of: options, with: ways))
    func resizes(_ options: String, _ ways: [String]) throws {
        for place in [own, theirs] { try make(options, in: place) }
        for way in ways {
            let before = try disk(own)
            let line =
                ["resize", "-f", "qcow2"] + way.words.dropLast() + ["image"] + way.words.suffix(1)
            let ours = try run(Swimg.path, line, in: own)
            let other = try run("qemu-img", line, in: theirs)
            #expect(ours.status == other.status && ours.outputText == other.outputText)
            #expect(ours.errors == other.errors, "\(ours)\n\(other)")
            let check = try run("qemu-img", ["check", "image"], in: own)
            #expect(check.isSuccess, "\(ours)\n\(check)")
            #expect(try info(own + "/image", "qcow2") == info(theirs + "/image", "qcow2"))
            let after = try disk(own)
            let kept = min(before.count, after.count)
            #expect(mismatch(after.prefix(kept), before.prefix(kept)) == nil, "\(ours)")
            #expect(mismatch(after.dropFirst(kept), Data(count: after.count - kept)) == nil)
            // The data file ends with the disk, unless nothing was to be done.
            guard after.count != before.count else { continue }
            #expect(FileStatus(own + "/data")?.size == Int64(after.count), "\(ours)")
            if options.contains("data_file_raw") {
                #expect(try mismatch(contents(own + "/data"), after) == nil, "\(ours)")
            }
        }
        // The image can be written to afterwards.
        try Qemu.io("qcow2", "image", ["write -P 9 0 512"], in: own)
        #expect(try run("qemu-img", ["check", "image"], in: own).isSuccess)
    }

    /// Bytes of a longer data file behind the end of the disk are no part of the disk.
    @Test(arguments: ["", "data_file_raw=on", "cluster_size=4k,data_file_raw=on"], ["1M", "3M"])
    func longerDataFile(_ options: String, _ size: String) throws {
        try make(options, in: own)
        let file = try #require(FileHandle(forUpdatingAtPath: own + "/data"))
        try file.seekToEnd()
        try file.write(contentsOf: Data(repeating: 0x66, count: 2 << 20))
        try file.close()
        let before = try disk(own)
        let outcome = try run(Swimg.path, ["resize", "image", size], in: own)
        #expect(outcome.isSuccess, "\(outcome)")
        let after = try disk(own)
        #expect(mismatch(after.prefix(before.count), before) == nil)
        let new = after.dropFirst(before.count)
        #expect(mismatch(new, Data(count: new.count)) == nil, "\(outcome)")
        if !options.isEmpty {
            #expect(try mismatch(contents(own + "/data"), after) == nil, "\(outcome)")
        }
    }

    /// The disk ends within a cluster that lies on the backing file.
    @Test(arguments: ["", "cluster_size=4k", "extended_l2=on"])
    func overABackingFile(_ options: String) throws {
        try writeFilled(own + "/base", byte: 0x5a, count: 3 << 20)
        let all = options.isEmpty ? "data_file=data" : "data_file=data,\(options)"
        try Qemu.img(
            "create", "-q", "-f", "qcow2", "-o", all, "-b", "base", "-F", "raw", "image",
            "1000448", in: own)
        try Qemu.io("qcow2", "image", ["write -P 1 100k 300k"], in: own)
        let before = try disk(own)
        let outcome = try run(Swimg.path, ["resize", "image", "2M"], in: own)
        #expect(outcome.isSuccess, "\(outcome)")
        let after = try disk(own)
        #expect(mismatch(after.prefix(before.count), before) == nil)
        let new = after.dropFirst(before.count)
        #expect(mismatch(new, Data(count: new.count)) == nil, "\(outcome)")
        #expect(try run("qemu-img", ["check", "image"], in: own).isSuccess)
    }

    /// A resize that fails or is killed at any write keeps the disk.
    @Test(
        .enabled(if: canTraceSystemCalls, "strace ends it at a certain write"),
        arguments: ["20M", "--preallocation=metadata 3M", "--shrink 300k"])
    func killedAnywhere(_ way: String) throws {
        let work = try TempFolder()
        try make("cluster_size=4k,data_file_raw=on", in: work.path)
        let before = try disk(work.path)
        let line =
            ["resize", "-f", "qcow2"] + way.words.dropLast() + ["image"] + way.words.suffix(1)
        let harms = usualHarms + [("ftruncate", "error=EIO")]
        try disturb(line, in: work, at: 1...8, by: harms) { copy, outcome in
            #expect(try Qemu.errors("image", in: copy.path) == nil, "\(outcome)")
            let after = try disk(copy.path)
            let kept = min(before.count, after.count)
            #expect(mismatch(after.prefix(kept), before.prefix(kept)) == nil, "\(outcome)")
        }
    }

    private func disk(_ place: String) throws -> Data {
        let raw = folder.path("content")
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", "image", raw, in: place)
        defer { try? FileManager.default.removeItem(atPath: raw) }
        return try contents(raw)
    }
}
