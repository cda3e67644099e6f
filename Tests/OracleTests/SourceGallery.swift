import Foundation
import TestSupport

/// One guest disk in many images: the targets of all conversions must hold the same disk.
struct SourceImage: Sendable, CustomStringConvertible {
    let name: String
    let format: String
    let path: String

    var description: String { name }
}

enum SourceGallery {
    /// Data, noise, half-filled clusters, single bytes, holes, written zeros and short zero runs.
    static let content: [UInt8] = {
        let letters =
            "A-1b0+--C0-2z--D 0000----3333AAAA a-a-a-a- ++++---- 5-6-7-8- ABCDEFGH"
            + "-------- -------- 9z9z9z9z 0000+--- E-"
        var bytes = DiskSketch(letters, cluster: 16384, size: 80 * 16384 + 1536).bytes
        // Zero runs of 1 to 20 sectors inside data, with varying alignment to 4 KiB.
        var sector = 80
        for run in 1...20 {
            bytes.replaceSubrange(
                sector * 512..<(sector + run) * 512, with: repeatElement(0, count: run * 512))
            sector += run + 3
        }
        // Islands of one sector inside zeros.
        for island in 0..<20 {
            let at = 60 * 16384 + island * 512 * 13
            bytes.replaceSubrange(at..<at + 512, with: sectors("i", first: island, count: 1))
        }
        return bytes
    }()

    static let folder: TempFolder = {
        guard let folder = try? TempFolder() else { fatalError("no temporary folder") }
        removeAtExit(folder.path)
        return folder
    }()

    static let reference: String = {
        let path = folder.path("reference.raw")
        do {
            try writeSparse(path, content)
        } catch {
            fatalError("\(error)")
        }
        return path
    }()

    static func named(_ name: String) throws -> SourceImage {
        guard let image = try all.get().first(where: { $0.name == name }) else {
            throw CommandError(description: "no source image \(name)")
        }
        return image
    }

    static let names: [String] =
        ["raw-sparse", "raw-full"] + converted.map(\.name) + [
            "zeros-written", "discarded", "rewritten", "chain-raw", "chain-qcow2", "chain-shorter",
            "chain-longer", "chain-deep", "chain-extended", "snapshots",
        ]

    private static let converted: [(name: String, flag: String, options: String)] = [
        ("v2-512", "-q", "compat=0.10,cluster_size=512"),
        ("v2-64k", "-q", "compat=0.10"),
        ("v3-512", "-q", "cluster_size=512"),
        ("v3-4k", "-q", "cluster_size=4k"),
        ("v3-64k", "-q", "lazy_refcounts=on"),
        ("v3-2M", "-q", "cluster_size=2M"),
        ("metadata", "-q", "preallocation=metadata"),
        ("falloc-4k", "-q", "preallocation=falloc,cluster_size=4k"),
        ("refcount-1", "-q", "refcount_bits=1,cluster_size=8k"),
        ("zlib-512", "-c", "cluster_size=512"),
        ("zlib-64k-v2", "-c", "compat=0.10"),
        ("zlib-2M", "-c", "cluster_size=2M"),
        ("zstd-4k", "-c", "compression_type=zstd,cluster_size=4k"),
        ("zstd-64k", "-c", "compression_type=zstd"),
        ("extended-16k", "-q", "extended_l2=on,cluster_size=16k"),
        ("extended-2M", "-q", "extended_l2=on,cluster_size=2M"),
        ("extended-zstd", "-c", "extended_l2=on,compression_type=zstd"),
    ]

    private static let all = Result { () throws -> [SourceImage] in
        var images = [SourceImage(name: "raw-sparse", format: "raw", path: reference)]
        func add(_ name: String, _ path: String, _ format: String = "qcow2") {
            images.append(SourceImage(name: name, format: format, path: path))
        }
        add("raw-full", try folder.write("full.raw", content), "raw")
        for (name, flag, options) in converted {
            let path = folder.path("\(name).qcow2")
            try Qemu.img(
                "convert", flag, "-f", "raw", "-O", "qcow2", "-o", options, reference, path)
            add(name, path)
        }
        let written = folder.path("zeros-written.qcow2")
        try Qemu.img("convert", "-f", "raw", "-O", "qcow2", "-S", "0", reference, written)
        try Qemu.io("qcow2", written, zeroRuns(65536).map { "write -z \($0.0) \($0.1)" })
        add("zeros-written", written)
        let discarded = folder.path("discarded.qcow2")
        try Qemu.img(
            "convert", "-f", "raw", "-O", "qcow2", "-S", "0", "-o", "cluster_size=4k", reference,
            discarded)
        try Qemu.io("qcow2", discarded, zeroRuns(4096).map { "discard \($0.0) \($0.1)" })
        add("discarded", discarded)
        try addChains { add($0, $1) }
        return images
    }

    /// Overlays over files that hold different data wherever the overlay has its own.
    private static func addChains(_ add: (String, String) -> Void) throws {
        let edits = [(3 * 16384, 7000), (200_192, 70144), (9 * 65536, 65536), (1_000_448, 512)]
            .map { ($0.0 / 512 * 512, $0.1 / 512 * 512) }
        var other = content
        for (at, length) in edits {
            other.replaceSubrange(at..<at + length, with: noise(9, length))
        }
        try writeSparse(folder.path("other.raw"), other)
        try writeSparse(folder.path("short.raw"), Array(other.prefix(700_000)))
        try writeSparse(folder.path("long.raw"), other + noise(8, 300_000))
        try Qemu.img(
            "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "other.raw",
            "other.qcow2", in: folder.path)
        func overlay(_ name: String, _ below: String, _ format: String, _ options: String) throws {
            try Qemu.img(
                "create", "-q", "-f", "qcow2", "-b", below, "-F", format, "-o", options,
                "\(name).qcow2", "\(content.count)", in: folder.path)
        }
        func correct(_ name: String, _ pieces: [(Int, Int)]) throws {
            try Qemu.io(
                "qcow2", folder.path("\(name).qcow2"),
                try pieces.enumerated().map {
                    let piece = try folder.write(
                        "\(name).\($0)", Array(content[$1.0..<$1.0 + $1.1]))
                    return "write -s \(piece) \($1.0) \($1.1)"
                })
        }
        try overlay("chain-raw", "other.raw", "raw", "cluster_size=64k")
        try correct("chain-raw", edits)
        try overlay("chain-qcow2", "other.qcow2", "qcow2", "compat=0.10,cluster_size=512")
        try correct("chain-qcow2", edits)
        try overlay("chain-longer", "long.raw", "raw", "cluster_size=4k")
        try correct("chain-longer", edits)
        try overlay("chain-extended", "other.qcow2", "qcow2", "extended_l2=on,cluster_size=64k")
        try correct("chain-extended", edits)
        try overlay("chain-shorter", "short.raw", "raw", "cluster_size=64k")
        let cut = 700_000 / 512 * 512
        let beyond = (cut, content.count - cut)
        try correct("chain-shorter", edits.filter { $0.0 + $0.1 < cut } + [beyond])
        try overlay("deep-1", "other.raw", "raw", "cluster_size=2M")
        try correct("deep-1", [edits[0]])
        try overlay("deep-2", "deep-1.qcow2", "qcow2", "cluster_size=512")
        try correct("deep-2", [edits[1]])
        try overlay("deep-3", "deep-2.qcow2", "qcow2", "extended_l2=on,cluster_size=16k")
        try correct("deep-3", [edits[2]])
        try overlay("chain-deep", "deep-3.qcow2", "qcow2", "cluster_size=64k")
        try correct("chain-deep", [edits[3]])
        for name in ["raw", "qcow2", "shorter", "longer", "deep", "extended"] {
            add("chain-\(name)", folder.path("chain-\(name).qcow2"))
        }
        // Snapshots share clusters with the active layer; later writes are copied.
        try Qemu.img(
            "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "other.raw",
            "snapshots.qcow2", in: folder.path)
        try Qemu.img("snapshot", "-c", "before", folder.path("snapshots.qcow2"))
        try correct("snapshots", edits)
        add("snapshots", folder.path("snapshots.qcow2"))
        try Qemu.img(
            "convert", "-c", "-f", "raw", "-O", "qcow2", "other.raw", "rewritten.qcow2",
            in: folder.path)
        try correct("rewritten", edits)
        add("rewritten", folder.path("rewritten.qcow2"))
    }

    /// Aligned ranges of zeros in the content.
    static func zeroRuns(_ step: Int) -> [(Int, Int)] {
        stride(from: 0, to: content.count, by: step).compactMap { at in
            let length = min(step, content.count - at)
            return content[at..<at + length].allSatisfy { $0 == 0 } ? (at, length) : nil
        }
    }

    /// Writes a file with a hole for each 4 KiB block of zeros.
    static func writeSparse(_ path: String, _ bytes: [UInt8]) throws {
        let file = try newFile(path)
        defer { try? file.close() }
        for at in stride(from: 0, to: bytes.count, by: 4096) {
            let block = bytes[at..<min(at + 4096, bytes.count)]
            if block.contains(where: { $0 != 0 }) {
                try file.seek(toOffset: UInt64(at))
                try file.write(contentsOf: block)
            }
        }
        try file.truncate(atOffset: UInt64(bytes.count))
    }
}
