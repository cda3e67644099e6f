import Foundation
import TestSupport
import Testing

/// Parallels images made by qemu-img and read by both programs.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct ParallelsTests {
    /// Disks in the letters of `DiskSketch`.
    static let disks = ["A-B0--1aZ", "-", "AAAA", "--1-", "-A+-0000-B-"]

    private func image(
        _ disk: String, clusterSize: String, in folder: TempFolder, isOld: Bool = false
    ) throws -> String {
        let sketch = DiskSketch(disk, cluster: 65536, size: disk.count * 65536 - 1536)
        try sketch.writeRaw(folder.path("raw"))
        let path = folder.path("image.hds")
        try Qemu.img(
            "convert", "-f", "raw", "-O", "parallels", "-o", "cluster_size=\(clusterSize)",
            folder.path("raw"), path)
        if isOld { try makeOld(path) }
        return path
    }

    /// Older images have another magic number, and their entries count sectors instead of clusters.
    private func makeOld(_ path: String) throws {
        var bytes = [UInt8](try contents(path))
        func number(_ offset: Int) -> UInt32 {
            (0..<4).reduce(0) { $0 | UInt32(bytes[offset + $1]) << (8 * $1) }
        }
        let sectors = number(28)
        bytes.replaceSubrange(0..<16, with: Array("WithoutFreeSpace".utf8))
        for index in 0..<Int(number(32)) {
            let offset = 64 + 4 * index
            let entry = number(offset) * sectors
            for byte in 0..<4 {
                bytes[offset + byte] = UInt8(truncatingIfNeeded: entry >> (8 * byte))
            }
        }
        try Data(bytes).write(to: URL(fileURLWithPath: path))
    }

    @Test(arguments: some(of: disks, with: ["64k", "4k", "1M"]))
    func reads(_ disk: String, _ clusterSize: String) throws {
        for isOld in [false, true] {
            let folder = try TempFolder()
            let path = try image(disk, clusterSize: clusterSize, in: folder, isOld: isOld)
            try compareMap([path])
            try compareMap(["-f", "parallels", path])
            for words in [["info"], ["info", "--output=json"], ["measure", "-O", "qcow2"]] {
                let theirs = try run("qemu-img", words + [path])
                let own = try run(Swimg.path, words + [path])
                #expect(
                    own.isSuccess && withoutChildren(own.outputText) == theirs.outputText,
                    "\(own)\n\(theirs)")
            }
            for (format, target) in [("raw", "a"), ("qcow2", "b")] {
                let own = try Swimg.convert("-O", format, path, folder.path(target))
                #expect(own.isSuccess, "\(own)")
                let difference = try Qemu.difference(
                    path, "parallels", folder.path(target), format)
                #expect(difference == nil)
                let same = try run(
                    Swimg.path,
                    ["compare", "-f", "parallels", "-F", format, path, folder.path(target)])
                #expect(same.isSuccess, "\(same)")
            }
            let digests = try ["image.hds", "a"].map {
                try run(Swimg.path, ["digest", folder.path($0)]).outputText.prefix { $0 != " " }
            }
            #expect(digests[0] == digests[1] && digests[0].hasPrefix("blkhash:"))
        }
    }

    /// Clusters in an order unrelated to the disk's.
    @Test(arguments: [1, 2, 3])
    func random(_ seed: UInt64) throws {
        var generator = SplitMix64(seed: seed)
        let folder = try TempFolder()
        let path = folder.path("image")
        try Qemu.img(
            "create", "-q", "-f", "parallels", "-o", "cluster_size=16k", path, "3000000")
        try Qemu.io(
            "parallels", path,
            (0..<40).map { _ in
                let start = Int.random(in: 0..<2_900_000 / 512, using: &generator) * 512
                return "write -P \(Int.random(in: 1...255, using: &generator)) \(start) 20k"
            })
        try compareMap([path])
        try Swimg.convert(path, folder.path("raw"))
        #expect(try Qemu.difference(path, "parallels", folder.path("raw"), "raw") == nil)
        let strict = try run(Swimg.path, ["compare", "-s", path, path])
        #expect(strict.isSuccess, "\(strict)")
    }

    /// A parallels image as the backing file of a qcow2 image.
    @Test func backing() throws {
        let folder = try TempFolder()
        let path = try image("A-B0", clusterSize: "64k", in: folder)
        let overlay = folder.path("overlay.qcow2")
        try Qemu.img("create", "-q", "-f", "qcow2", "-b", path, "-F", "parallels", overlay)
        try Qemu.io("qcow2", overlay, ["write 80k 10k"])
        try compareMap([overlay])
        try Swimg.convert(overlay, folder.path("raw"))
        #expect(try Qemu.difference(overlay, "qcow2", folder.path("raw"), "raw") == nil)
    }

    /// Invalid numbers in the header and the table: offset, bytes and words of the message.
    static let damage: [(Int, [UInt8], String)] = [
        (16, [3], "version 3"), (28, [0, 0, 0, 0], "cluster has 0 sectors"),
        (28, [255, 255, 255, 255], "sectors"), (32, [255, 255, 255, 127], "entries"),
        (32, [255, 255, 0, 0], "lies beyond the end"), (43, [255], "sectors"),
        (64, [255, 255, 255, 255], "no place"), (52, [1], "marked as empty"),
    ]

    @Test(arguments: damage.indices)
    func refuses(_ index: Int) throws {
        let (offset, bytes, words) = Self.damage[index]
        let folder = try TempFolder()
        let path = try image("A-B0", clusterSize: "64k", in: folder)
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
        try file.seek(toOffset: UInt64(offset))
        file.write(Data(bytes))
        try file.close()
        let own = try Swimg.convert(path, folder.path("target"))
        #expect(own.status == 1 && own.errorText.contains(words), "\(own)")
        #expect(own.errorText.split(separator: "\n").count == 1, "\(own)")
        #expect(!FileManager.default.fileExists(atPath: folder.path("target")))
        // Entries of the table are looked at when the disk is read.
        let check = try run(Swimg.path, ["check", path])
        #expect(check.status == (offset == 64 ? 63 : 1), "\(check)")
    }

    /// The table of a disk of terabytes is gigabytes long, and no more than a part is in memory.
    @Test(.enabled(if: hasProgram("time"))) func hugeTableIsReadInParts() throws {
        let folder = try TempFolder()
        let path = folder.path("image")
        try Qemu.img("create", "-q", "-f", "parallels", path, "10M")
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
        // Bytes 32 to 43: entries of the table, and sectors of the disk.
        try file.seek(toOffset: 32)
        file.write(Data([255, 255, 255, 15, 0, 0, 0, 0, 1, 0, 0, 0]))
        try file.truncate(atOffset: 3 << 30)
        try file.close()
        let outcome = try run("time", ["-f", "%M", Swimg.path, "measure", "-O", "qcow2", path])
        #expect(outcome.isSuccess, "\(outcome)")
        let peak = outcome.errorText.split(separator: "\n").last.flatMap { Int($0) }
        #expect(try #require(peak) < 64 << 10, "KiB")
    }

    /// An image that is marked as empty, and is.
    @Test func emptyImage() throws {
        let folder = try TempFolder()
        let path = folder.path("image")
        try Qemu.img("create", "-q", "-f", "parallels", path, "10M")
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
        try file.seek(toOffset: 52)
        file.write(Data([1]))
        try file.close()
        try compareMap([path])
    }

    @Test func isForReadingOnly() throws {
        let folder = try TempFolder()
        let path = try image("A-", clusterSize: "64k", in: folder)
        let check = try run(Swimg.path, ["check", path])
        #expect(check.status == 63, "\(check)")
        let resize = try run(Swimg.path, ["resize", path, "10M"])
        #expect(resize.status == 1, "\(resize)")
        #expect(resize.errorText.contains("does not support resize"), "\(resize)")
        let target = try Swimg.convert("-O", "parallels", path, folder.path("b"))
        #expect(target.status == 1, "\(target)")
        #expect(target.errorText.contains("does not support image creation"), "\(target)")
    }
}
