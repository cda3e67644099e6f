import Foundation
import TestSupport
import Testing

/// qemu-img and swimg run the same command: text, status and image must be the same.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct CreateTests {
    private let folder: TempFolder

    init() throws {
        folder = try TempFolder()
        try writeFilled(folder.path("base.raw"), byte: 7, count: 700_001)
        try Qemu.img("create", "-q", "-f", "qcow2", folder.path("base.qcow2"), "3M")
    }

    static let plain = [
        "-f raw", "", "-f qcow2", "-f qcow2 -o compat=0.10", "-f qcow2 -o compat=v3",
        "-f qcow2 -o cluster_size=512", "-f qcow2 -o cluster_size=2048k -q",
        "-f qcow2 -o cluster_size=64k,cluster_size=4k -o refcount_bits=8",
        "-f qcow2 -o compression_type=zstd", "-f qcow2 -o lazy_refcounts=yes",
        "-f qcow2 -o lazy_refcounts", "-f qcow2 -o refcount_bits=1",
        "-f qcow2 -o refcount_bits=64,cluster_size=512", "-f qcow2 -o extended_l2=on",
        "-f qcow2 -o extended_l2=on,cluster_size=16k", "-f qcow2 -o nocow=on,encryption=off",
        "-f qcow2 -b base.qcow2 -F qcow2", "-f qcow2 -o backing_file=base.raw,backing_fmt=raw",
        "-f qcow2 -u -b nowhere -F qcow2", "-f qcow2 --object secret,id=s,data=x",
    ]

    @Test(arguments: plain, some(3, of: ["1000", "0", "1.5g", "1M", "20G", "0x20000"]))
    func emptyImages(_ options: String, _ size: String) throws {
        try compareCreation(options.words + ["new", size])
    }

    /// An empty image is laid out as qemu's, down to the last byte.
    @Test(
        arguments: [
            "cluster_size=64k", "compat=0.10", "cluster_size=2M", "cluster_size=4k",
            "refcount_bits=1,cluster_size=8k", "extended_l2=on", "compression_type=zstd",
            "lazy_refcounts=on,backing_file=base.raw,backing_fmt=raw", "data_file=data",
        ], ["1M", "300G"])
    func sameBytes(_ options: String, _ size: String) throws {
        let command = ["create", "-f", "qcow2", "-o", options, "new", size]
        _ = try run("qemu-img", command, in: folder.path)
        let theirs = try contents(folder.path("new"))
        try FileManager.default.removeItem(atPath: folder.path("new"))
        _ = try run(Swimg.path, command, in: folder.path)
        #expect(try contents(folder.path("new")) == theirs)
    }

    static let preallocated =
        [
            "-f raw -o preallocation=falloc", "-f raw -o preallocation=full",
        ]
        + ["metadata", "falloc", "full"].flatMap { mode in
            [
                "", ",cluster_size=512", ",cluster_size=4k,compat=0.10", ",cluster_size=2M",
                ",cluster_size=1k,refcount_bits=64", ",cluster_size=1k,refcount_bits=1",
                ",extended_l2=on", ",lazy_refcounts=on",
            ].map { "-f qcow2 -o preallocation=\(mode)\($0)" }
        }

    @Test(arguments: preallocated, some(2, of: ["1000", "0", "5000192", "3M"]))
    func preallocatedImages(_ options: String, _ size: String) throws {
        try compareCreation(options.words + ["new", size])
    }

    /// The tables of many terabytes would not fit into memory.
    @Test(arguments: ["cluster_size=2M", "cluster_size=1M,refcount_bits=1"])
    func largeMetadata(_ options: String) throws {
        try compareCreation(
            ["-f", "qcow2", "-o", "preallocation=metadata,\(options)", "new", "2T"])
    }

    /// The size comes from the backing file.
    @Test(arguments: [
        "-b base.qcow2 -F qcow2", "-b base.raw -F raw",
        "-o backing_file=base.qcow2 -b base.raw -F raw -o cluster_size=512",
        "-b base.raw -F raw -o extended_l2=on,preallocation=metadata",
    ])
    func sizeOfTheBackingFile(_ options: String) throws {
        try compareCreation(["-f", "qcow2"] + options.words + ["new"])
    }

    @Test(arguments: [
        "-f qcow2 new", "new", "-f qcow2 -u -b nowhere -F qcow2 new", "-f qcow2 -F qcow2 new 1M",
        "-f qcow2 -u -b nowhere new 1M", "-f raw -b base.raw -F raw new", "new 8E", "new 7E",
        "-f qcow2 new 1E", "-f qcow2 -o size=5M new 1M", "-f nosuch new 1M",
        "-f qcow2 -o nosuch=1 new 1M", "-f raw -o cluster_size=4k new 1M",
        "-f qcow2 -o ,compat=1.1 new 1M", "-f qcow2 -o cluster_size=100 new 1M",
        "-f qcow2 -o cluster_size=4M new 1M", "-f qcow2 -o refcount_bits=3 new 1M",
        "-f qcow2 -o refcount_bits=x new 1M", "-f qcow2 -o refcount_bits=8,compat=0.10 new 1M",
        "-f qcow2 -o lazy_refcounts=1 new 1M", "-f qcow2 -o lazy_refcounts=on,compat=v2 new 1M",
        "-f qcow2 -o extended_l2=on,cluster_size=8k new 1M",
        "-f qcow2 -o extended_l2=on,compat=0.10 new 1M", "-f qcow2 -o compat=0.9 new 1M",
        "-f qcow2 -o compression_type=zstd,compat=0.10 new 1M",
        "-f qcow2 -o compression_type=foo new 1M", "-f raw -o preallocation=metadata new 1M",
        "-f raw -o preallocation=foo new 1M", "-f qcow2 -o preallocation=foo new 1M",
        "-f qcow2 -o preallocation new 1M", "-f raw -o extent_size_hint=8G new 1M",
        "-f qcow2 -b base.raw -F raw -o preallocation=metadata new", "-f qcow2 -b new -F raw new",
    ])
    func refusals(_ line: String) throws {
        let theirs = try run("qemu-img", ["create"] + line.words, in: folder.path)
        try? FileManager.default.removeItem(atPath: folder.path("new"))
        let ours = try run(Swimg.path, ["create"] + line.words, in: folder.path)
        #expect(ours.status == 1 && theirs.status == 1, "\(ours)\n\(theirs)")
        #expect(ours.outputText == theirs.outputText, "\(ours)\n\(theirs)")
        #expect(withoutName(ours) == withoutName(theirs))
        #expect(!folder.names.contains("new"), "left behind by \(ours)")
    }

    @Test(arguments: [
        "create -o help", "create -f raw -o help new", "create -f qcow2 -o help",
        "create -f qcow2 -o help new", "convert -O raw -o help", "convert -O qcow2 -o help",
        "convert -O qcow2 -o compat=1.1,help base.raw new",
    ])
    func optionsAreListed(_ line: String) throws {
        let ours = try run(Swimg.path, line.words, in: folder.path)
        #expect(ours.outputText == (try require("qemu-img", line.words, in: folder.path)))
        #expect(ours.isSuccess && ours.errors.isEmpty, "\(ours)")
    }

    /// Sizes in all forms, as a word and as an option.
    @Test(arguments: [
        "1024", "1024b", "1024B", "1024.0", "1024.0b", "1.5", "1.5b", "1.5k", "1.5G", "1.5x", ".5k",
        "5.", "5.k", "5.b", "1e3", "1E", "0x10", "0x10k", "0x1.8", "0x", "0X10", "0x1e", "0x1b",
        "0xk", " 10", "10 ", "+5", "++5", "-5", "-0", "010", "0.0001k", "0.0005k", "0.9999k",
        "18446744073709551616", "18446744073709551615", "9223372036854775808", "16E", "8E", "7.9E",
        "1.1.1", "", "k", "1kk", "1kB", "1KiB", "0.5b", "inf", "nan", "1,5", "1_0", "00x10", "1M",
        "1.99999k", "9007199254740993k", "1.5e3k", "١",
    ])
    func sizesInAllForms(_ size: String) throws {
        for words in [["new", "--", size], ["-o", "size=\(size)", "new"]] {
            // A comma divides options.
            if words.first == "-o", size.contains(",") { continue }
            let line = ["create", "-q", "-f", "raw"] + words
            var sizes: [Int64?] = []
            var statuses: [Int32] = []
            for program in ["qemu-img", Swimg.path] {
                try? FileManager.default.removeItem(atPath: folder.path("new"))
                let outcome = try run(program, line, in: folder.path)
                statuses.append(outcome.status)
                sizes.append(outcome.isSuccess ? FileStatus(folder.path("new"))?.size : nil)
            }
            #expect(statuses[0] == statuses[1] && sizes[0] == sizes[1], "\(line) \(sizes)")
        }
    }

    /// An existing file is replaced completely or left unchanged.
    @Test func existingFiles() throws {
        let path = folder.path("new")
        try writeFilled(path, byte: 1, count: 100_000)
        try FileManager.default.setAttributes([.posixPermissions: 0o640], ofItemAtPath: path)
        let refused = try run(Swimg.path, "create -f qcow2 -o cluster_size=3".words + [path, "1M"])
        #expect(refused.status == 1)
        #expect(try contents(path).count == 100_000)
        try require(Swimg.path, ["create", "-q", "-f", "qcow2", path, "1M"])
        #expect(try #require(FileStatus(path)).mode & 0o777 == 0o640)
        #expect(try Qemu.damage(path) == nil)
        let busy = try run(Swimg.path, ["create", "-b", path, "-F", "qcow2", "-f", "qcow2", path])
        #expect(busy.status == 1, "\(busy)")
    }

    private func compareCreation(_ words: [String]) throws {
        let theirs = try run("qemu-img", ["create"] + words, in: folder.path)
        let judged = folder.path("qemu")
        try FileManager.default.moveItem(atPath: folder.path("new"), toPath: judged)
        let ours = try run(Swimg.path, ["create"] + words, in: folder.path)
        #expect(ours.status == theirs.status && ours.errors == theirs.errors, "\(ours)\n\(theirs)")
        #expect(ours.outputText == theirs.outputText)
        let image = folder.path("new")
        let format = words.contains("qcow2") ? "qcow2" : "raw"
        #expect(try info(image, format) == info(judged, format), "\(ours)")
        guard !words.contains("nowhere") else { return }
        if format == "qcow2" { #expect(try Qemu.damage(image) == nil, "\(ours)") }
        #expect(try Qemu.difference(image, format, judged, format) == nil, "\(ours)")
        #expect(try coverage(image, format) == coverage(judged, format), "\(ours)")
        let (own, their) = try (
            #require(FileStatus(image)).allocated, #require(FileStatus(judged)).allocated
        )
        // The tables may be laid out differently.
        #expect(abs(own - their) <= max(6 << 20, their / 20), "\(ours): \(own), not \(their)")
    }
}

/// Guest bytes present in each layer; -1 counts absent ones. Holes are not compared: they depend on
/// the file's blocks.
private func coverage(_ path: String, _ format: String) throws -> [Int: Int64] {
    let text = try Qemu.img("map", "--output=json", "-f", format, path)
    var result: [Int: Int64] = [:]
    for entry in try JSONDecoder().decode([PresentEntry].self, from: Data(text.utf8)) {
        result[entry.present ? entry.depth : -1, default: 0] += entry.length
    }
    return result
}

private struct PresentEntry: Decodable {
    let length: Int64
    let depth: Int
    let present: Bool
}
