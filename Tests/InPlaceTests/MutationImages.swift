import Foundation
import TestSupport

/// The unmodified images for mutations: small ones of every kind, made by the stock qemu-img.
struct MutationImage: Sendable {
    let name: String
    let bytes: [UInt8]
    /// The backing file, named `below`.
    let backing: [UInt8]?
    let snapshots: Int

    /// Creation options, other features, and the disk's size.
    private static let kinds: [(options: String, features: String, size: String)] = [
        ("cluster_size=512", "", "200k"),
        ("cluster_size=512,refcount_bits=64", "snapshots", "150k"),
        ("cluster_size=512,refcount_bits=1", "", "150k"),
        ("cluster_size=4k", "snapshots", "2M"),
        ("cluster_size=4k,refcount_bits=1", "", "1500k"),
        ("cluster_size=4k,refcount_bits=64", "backing", "1000k"),
        ("cluster_size=4k,preallocation=metadata", "", "1M"),
        ("cluster_size=4k,compat=0.10", "backing", "1M"),
        ("cluster_size=4k,compat=0.10", "snapshots", "3M"),
        ("cluster_size=512,compat=0.10", "", "100k"),
        ("cluster_size=64k", "snapshots", "3M"),
        ("cluster_size=64k", "bitmaps", "2M"),
        ("cluster_size=4k", "bitmaps snapshots", "1M"),
        ("cluster_size=64k", "backing", "1M"),
        ("compat=0.10", "", "1M"),
        ("cluster_size=16k,extended_l2=on", "", "2M"),
        ("cluster_size=16k,extended_l2=on", "backing snapshots", "1M"),
        ("cluster_size=64k,extended_l2=on", "snapshots", "3M"),
        ("cluster_size=512", "compressed", "100k"),
        ("cluster_size=4k", "compressed", "1M"),
        ("cluster_size=4k", "compressed snapshots", "1M"),
        ("cluster_size=4k,compression_type=zstd", "compressed", "1M"),
        ("cluster_size=64k", "compressed", "2M"),
        ("cluster_size=64k,compression_type=zstd", "compressed snapshots", "2M"),
        ("cluster_size=16k,extended_l2=on", "compressed", "1M"),
        ("cluster_size=4k,compat=0.10", "compressed", "1M"),
    ]

    static let all: Result<[MutationImage], any Error> = Result {
        try kinds.map { try make($0.options, $0.features, $0.size) }
    }

    private static func make(
        _ options: String, _ features: String, _ size: String
    ) throws -> MutationImage {
        let folder = try TempFolder()
        let path = folder.path("image")
        let words = features.words
        func io(_ commands: String...) throws { try Qemu.io("qcow2", path, commands) }
        var below: [String] = []
        if words.contains("backing") {
            try Qemu.img("create", "-q", "-f", "raw", folder.path("below"), "700k")
            try Qemu.io("raw", folder.path("below"), ["write -P 0x55 30k 500k"])
            below = ["-b", "below", "-F", "raw"]
        }
        try require(
            "qemu-img", ["create", "-q", "-f", "qcow2"] + below + ["-o", options, path, size])
        let end = Int(try Qcow2Fields(path).virtualSize)
        if words.contains("compressed") {
            let source = folder.path("source")
            try DiskSketch("AbC+D-E0FG", cluster: end / 10 / 512 * 512, size: end)
                .writeRaw(source)
            try FileManager.default.removeItem(atPath: path)
            try require(
                "qemu-img",
                ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, path])
        } else {
            try io(
                "write -P 1 0 40k", "write -P 2 45k 3k", "write -P 3 \(end - 9000) 8k",
                "write -z 50k 10k", "write -P 4 70k 20k", "discard 8k 4k")
        }
        if words.contains("snapshots") {
            try Qemu.img("snapshot", "-c", "first", path)
            try io("write -P 5 4k 30k", "write -P 6 \(end - 4096) 4k")
            try Qemu.img("snapshot", "-c", "another", path)
            try io("write -P 7 16k 50k")
        }
        if words.contains("bitmaps") {
            try Qemu.img("bitmap", "--add", path, "bits")
            try io("write -P 8 20k 30k")
        }
        return MutationImage(
            name: "\(size), \(options) \(features)", bytes: [UInt8](try contents(path)),
            backing: below.isEmpty ? nil : [UInt8](try contents(folder.path("below"))),
            snapshots: words.contains("snapshots") ? 2 : 0)
    }
}
