import Foundation
import TestSupport
import Testing

/// The size of targets and the packing of compressed clusters.
@Suite(.enabled(if: Qemu.isInstalled, "measured against qemu-img")) struct SpaceTests {
    /// A few MiB of typical disk content: text, tables, noise, zeros in between.
    private func writeDisk(_ path: String) throws {
        let letters = String(repeating: "A1-b0+C-2--3D4e-FGHIJK------LMNO", count: 3)
        try DiskSketch(letters, size: 96 * 65536 - 3584).writeRaw(path)
    }

    @Test(arguments: [
        "-O raw", "-O raw -W", "-O raw -S 0", "-O raw -S 64k", "-O raw -S 512", "-O raw -t none",
        "-O qcow2", "-O qcow2 -W", "-O qcow2 -o cluster_size=512", "-O qcow2 -o cluster_size=4k",
        "-O qcow2 -o cluster_size=2M", "-O qcow2 -S 64k", "-O qcow2 -o compat=0.10",
        "-O qcow2 -S 0", "-O qcow2 -o extended_l2=on", "-O qcow2 -W -o extended_l2=on",
        "-O qcow2 -o extended_l2=on,cluster_size=2M", "-O qcow2 -S 0 -o extended_l2=on",
        "-O qcow2 -o extended_l2=on,cluster_size=16k", "-c -O qcow2 -o extended_l2=on",
        "-c -O qcow2", "-c -O qcow2 -W", "-c -O qcow2 -o cluster_size=4k",
        "-c -O qcow2 -o cluster_size=2M", "-c -O qcow2 -o compression_type=zstd",
        "-c -O qcow2 -o compression_type=zstd,cluster_size=4k",
    ])
    func takesNoMoreThanQemu(_ line: String) throws {
        let folder = try TempFolder()
        try writeDisk(folder.path("source"))
        let options = line.words + ["-f", "raw", "source"]
        // Ordered writes, with which qemu-img packs best.
        let theirs = try require(
            "qemu-img", ["convert"] + options.filter { $0 != "-W" } + ["theirs"], in: folder.path)
        #expect(theirs.isEmpty)
        let outcome = try Swimg.convert(options + ["own"], in: folder.path)
        #expect(outcome.isSuccess, "\(outcome)")
        try require("sync", ["-f", "own", "theirs"], in: folder.path)
        let own = try #require(FileStatus(folder.path("own")))
        let other = try #require(FileStatus(folder.path("theirs")))
        // Compressed targets within a percent. The file system's own blocks depend on the time of
        // its writes: ext4 takes one for a file with more than four extents.
        let fileSystemBlocks: Int64 = 2 * 4096
        let slack = (line.contains("-c") ? other.allocated / 100 : 0) + fileSystemBlocks
        #expect(
            own.allocated <= other.allocated + slack,
            "\(own.allocated) bytes, qemu-img takes \(other.allocated): \(outcome)")
        // swimg's file ends with a whole cluster, a hole after the last stream or subcluster;
        // qemu's ends with these.
        let clusterBits = (try? Qcow2Fields(folder.path("own")))?.clusterBits ?? 0
        let isPartial = line.contains("-c") || line.contains("extended_l2")
        let longer =
            (line.contains("-c") ? other.size / 100 : 0) + (isPartial ? 1 << clusterBits : 0)
        #expect(
            own.size <= other.size + longer,
            "\(own.size) bytes long, qemu-img's is \(other.size): \(outcome)")
    }

    /// `-S 0` means fully allocated, whatever holes the source has.
    @Test(arguments: ["raw-sparse", "v3-64k", "zeros-written", "zlib-512"], ["raw", "qcow2"])
    func sparseSizeZeroAllocatesAll(_ name: String, _ format: String) throws {
        let folder = try TempFolder()
        let source = try SourceGallery.named(name)
        let outcome = try Swimg.convert(
            "-S", "0", "-f", source.format, "-O", format, source.path, folder.path("own"))
        #expect(outcome.isSuccess, "\(outcome)")
        try require("sync", ["-f", folder.path("own")])
        let status = try #require(FileStatus(folder.path("own")))
        #expect(status.allocated >= Int64(SourceGallery.content.count), "\(outcome)")
        let map = try Qemu.map(folder.path("own"), format)
        let data = map.filter(\.data).map(\.length).reduce(0, +)
        #expect(data == Int64(SourceGallery.content.count), "\(map)")
    }

    /// swimg stores exactly the guest ranges as data that qemu-img does, for every `-S`.
    @Test(
        arguments: ["", "-S 512", "-S 4k", "-S 64k", "-S 1M"], ["raw-sparse", "raw-full", "v3-512"])
    func allocatesTheSameClusters(_ mode: String, _ name: String) throws {
        let folder = try TempFolder()
        let source = try SourceGallery.named(name)
        let words = mode.words
        for cluster in ["512", "4k", "64k"] {
            let line =
                words + ["-m", "1", "-f", source.format, "-O", "qcow2"]
                + ["-o", "cluster_size=\(cluster)", source.path]
            try require("qemu-img", ["convert"] + line + [folder.path("theirs")])
            let outcome = try Swimg.convert(line + [folder.path("own")])
            #expect(outcome.isSuccess, "\(outcome)")
            let own = try Qemu.map(folder.path("own"), "qcow2").filter(\.data)
            let theirs = try Qemu.map(folder.path("theirs"), "qcow2").filter(\.data)
            let ownBytes = own.map(\.length).reduce(0, +)
            let theirBytes = theirs.map(\.length).reduce(0, +)
            #expect(ownBytes <= theirBytes, "qemu-img allocates \(theirBytes): \(outcome)")
        }
    }

    /// Readers that decompress with qemu's 4 KiB window must be able to read swimg's streams.
    @Test(
        .enabled(if: hasProgram("python3"), "python3 inflates with a small window"),
        arguments: [
            "-c -O qcow2 -W", "-c -O qcow2 -o cluster_size=512",
            "-c -O qcow2 -o cluster_size=2M",
        ])
    func deflateStreamsFitASmallWindow(_ line: String) throws {
        let folder = try TempFolder()
        try writeDisk(folder.path("source"))
        // Matches at every distance up to 32 KiB, for which a larger window would pay.
        let block = noise(5, 30000)
        var bytes: [UInt8] = []
        for distance in [3000, 4095, 4096, 4097, 5000, 8192, 20000, 30000] {
            for _ in 0..<3 { bytes += block.prefix(distance) }
        }
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: folder.path("source")))
        try file.write(contentsOf: bytes)
        try file.close()
        let outcome = try Swimg.convert(
            line.words + ["-f", "raw", "source", "own"],
            in: folder.path)
        #expect(outcome.isSuccess, "\(outcome)")
        let said = try require("python3", ["-c", inflateScript, "own", "source"], in: folder.path)
        let streams = try #require(Int(said.trimmingCharacters(in: .whitespacesAndNewlines)))
        #expect(streams > 0, "nothing was compressed: \(outcome)")
    }
}

/// Finds every compressed cluster through the tables, inflates it in small steps with a
/// 4 KiB window, compares it with the disk and prints the number of clusters.
private let inflateScript = #"""
    import struct, sys, zlib
    image, disk = open(sys.argv[1], "rb").read(), open(sys.argv[2], "rb").read()
    bits, size = struct.unpack_from(">IQ", image, 20)
    l1_size, l1_at = struct.unpack_from(">IQ", image, 36)
    cluster, shift, streams = 1 << bits, 62 - (bits - 8), 0
    for number, l1 in enumerate(struct.unpack_from(f">{l1_size}Q", image, l1_at)):
        l2_at = l1 & 0x00FFFFFFFFFFFE00
        entries = struct.unpack_from(f">{cluster // 8}Q", image, l2_at) if l2_at else ()
        for index, entry in enumerate(entries):
            if not entry >> 62 & 1:
                continue
            at = entry & (1 << shift) - 1
            end = (at // 512 + (entry >> shift & (1 << bits - 8) - 1) + 1) * 512
            inflater, out, stored = zlib.decompressobj(-12), b"", image[at:end]
            for step in range(0, len(stored), 16):
                piece = stored[step : step + 16]
                while not inflater.eof:
                    got = inflater.decompress(piece, 100)
                    out, piece = out + got, inflater.unconsumed_tail
                    if not piece and len(got) < 100:
                        break
            guest = (number * (cluster // 8) + index) * cluster
            expected = disk[guest : guest + cluster].ljust(cluster, b"\0")
            assert inflater.eof and out == expected, f"cluster at guest offset {guest}"
            streams += 1
    print(streams)
    """#
