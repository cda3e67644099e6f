import Foundation
import TestSupport
import Testing

/// A resize that fails leaves the image unchanged; one that succeeds leaves a sound image with the
/// same disk, whatever unused tables contain.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct DamagedResizeTests {
    private let folder: TempFolder
    private var image: String { folder.path("image") }

    init() throws { folder = try TempFolder() }

    struct Case: Sendable, CustomTestStringConvertible {
        let name: String
        var options = "cluster_size=64k"
        var size = "1M"
        var writes = ["write -P 1 0 128k"]
        /// Arguments of `qemu-img` commands to run after the image has been written to.
        var then: [[String]] = []
        let damage: @Sendable (Qcow2Patcher) throws -> Void
        let ways: [String]

        var testDescription: String { name }
    }

    private func make(_ item: Case) throws {
        try? FileManager.default.removeItem(atPath: image)
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", item.options, image, item.size)
        try Qemu.io("qcow2", image, item.writes)
        for words in item.then { try require("qemu-img", words + [image]) }
        try item.damage(Qcow2Patcher(image))
    }

    private static let data: UInt64 = 1 << 63

    static let refused: [Case] = [
        Case(
            name: "no refcounts", damage: { try $0.setWord($0.refcountTable, 0) },
            ways: ["--shrink 512k", "--preallocation=full +100T", "+1M"]),
        Case(
            name: "the last two refcounts are 0",
            damage: { for cluster in [5, 6] { try $0.setRefcount(cluster, 0) } },
            ways: ["--shrink 64k", "--preallocation=full +100T", "+1M"]),
        Case(
            name: "the refcount of what is cut is 0", writes: ["write -P 1 0 1M"],
            damage: { try $0.setRefcount(12, 0) }, ways: ["--shrink 256k", "+1M"]),
        Case(
            name: "no L1 table", options: "cluster_size=4k", size: "2M",
            damage: { try $0.setWord(40, 0) }, ways: ["3M", "--shrink 1M"]),
        Case(
            name: "no L1 table, counted", options: "cluster_size=4k", size: "2M",
            damage: {
                try $0.setWord(40, 0)
                try $0.setRefcount(0, 2)
            }, ways: ["5M", "--shrink 1M"]),
        Case(
            name: "an unaligned entry behind the new end",
            damage: { try $0.setWord($0.l2Entry(15), 0x8000) },
            ways: ["--shrink 512k", "--preallocation=metadata 2M"]),
        Case(
            name: "an entry of the first cluster", options: "cluster_size=4k",
            damage: { try $0.setWord($0.l2Entry(200), 1 << 62 | 512) },
            ways: ["--shrink 512k", "3M"]),
        Case(
            name: "a stray entry that names data", size: "512k",
            damage: { try $0.setWord($0.l2Entry(8), $0.word($0.l2Entry(0))) },
            ways: ["--preallocation=metadata 1M", "1M", "--shrink 64k"]),
        Case(
            name: "a bad L1 entry", options: "cluster_size=4k", size: "8M",
            damage: { try $0.change($0.l1) { $0 | 1 << 57 } },
            ways: ["--shrink 4M", "9M", "--preallocation=metadata 9M"]),
        Case(
            name: "an L2 table beyond the end", options: "cluster_size=4k", size: "8M",
            damage: { try $0.setWord($0.l1 + 24, Self.data | 1 << 40) },
            ways: ["--shrink 4M", "9M", "--preallocation=metadata 9M"]),
        Case(
            name: "an L2 table at the end", options: "cluster_size=4k", size: "2M",
            damage: {
                let end = ($0.fileSize + 4095) / 4096 * 4096
                try $0.setWord($0.l1, Self.data | UInt64(end))
            }, ways: ["5M", "--shrink 1M"]),
        Case(
            name: "an L2 table that is cut short", options: "cluster_size=4k", size: "8M",
            damage: {
                let end = $0.fileSize / 4096 * 4096
                try $0.truncate(to: end + 100)
                try $0.setWord($0.l1 + 24, Self.data | UInt64(end))
                try $0.setRefcount(end / 4096, 1)
            }, ways: ["--shrink 4M", "--preallocation=metadata 9M"]),
        Case(
            name: "L1 table and snapshot table in one place", then: [["snapshot", "-c", "s"]],
            damage: { try $0.setWord(40, $0.word(64)) },
            ways: ["--preallocation=metadata 2M", "--shrink 512k"]),
        Case(
            name: "L1 table and snapshot table in one place, counted",
            then: [["snapshot", "-c", "s"]],
            damage: {
                let table = try $0.word(64)
                try $0.setWord(40, table)
                try $0.setRefcount(Int(table >> 16), 2)
            }, ways: ["--preallocation=metadata 2M", "--shrink 512k"]),
        Case(
            name: "refcounts in data",
            damage: {
                let data = try $0.word($0.l2Entry(0)) & ~Self.data
                try $0.setWord($0.refcountTable + 8, data)
            }, ways: ["3G", "--preallocation=metadata 3G", "--shrink 64k"]),
        Case(
            name: "one refcount block twice",
            damage: { try $0.setWord($0.refcountTable + 800, $0.word($0.refcountTable)) },
            ways: ["2M", "--preallocation=metadata 2M"]),
        Case(
            name: "a refcount block for clusters that no offset reaches",
            options: "cluster_size=2M,refcount_bits=1", size: "16M", writes: [],
            damage: {
                try $0.truncate(to: 8 << 20)
                try $0.write([0, 0, 0, 2], at: 56)
                try $0.setWord($0.refcountTable + 8 << 18, 0x40_0000)
            }, ways: ["--shrink 4M", "--preallocation=metadata +2M"]),
        Case(
            name: "no space", damage: { _ in },
            ways: ["--preallocation=full +100T", "--preallocation=falloc +100T"]),
        Case(
            name: "unknown features and no space",
            damage: { try $0.write([0x80], at: 95) }, ways: ["--preallocation=full +100T"]),
    ]

    @Test(arguments: refused)
    func leavesTheImage(_ item: Case) throws {
        for way in item.ways {
            try make(item)
            let before = try contents(image)
            let outcome = try run(
                Swimg.path, ["resize"] + way.words.dropLast() + [image] + way.words.suffix(1))
            #expect(outcome.status == 1 && outcome.output.isEmpty, "\(outcome)")
            #expect(outcome.errorText.count(where: { $0 == "\n" }) == 1, "\(outcome)")
            let difference = try mismatch(contents(image), before)
            #expect(difference == nil, "\(outcome)")
        }
    }

    static let accepted: [Case] = [
        Case(
            name: "a stray entry", size: "512k",
            writes: ["write -P 1 0 128k", "write -P 2 448k 64k"],
            damage: {
                try $0.setWord($0.l2Entry(8), $0.word($0.l2Entry(7)))
                try $0.setWord($0.l2Entry(7), 0)
            },
            ways: ["1M", "--preallocation=metadata 1M", "--preallocation=off 10G", "--shrink 64k"]
        ),
        Case(
            name: "a stray entry that names data, counted", size: "512k",
            damage: {
                try $0.change($0.l2Entry(0)) { $0 & ~Self.data }
                try $0.setWord($0.l2Entry(8), $0.word($0.l2Entry(0)))
                try $0.setRefcount(Int($0.word($0.l2Entry(0)) >> 16), 2)
            },
            ways: ["1M", "--preallocation=metadata 1M", "--shrink 64k", "--shrink 64k +1M"]),
        Case(
            name: "refcounts behind the end",
            damage: { for cluster in [7, 8, 11, 500] { try $0.setRefcount(cluster, 1) } },
            ways: ["2M", "--preallocation=metadata 2M", "--shrink 64k", "1T"]),
        Case(
            name: "leaks at the end", damage: { try $0.truncate(to: $0.fileSize + 200_000) },
            ways: ["2M", "--preallocation=metadata 2M", "--shrink 64k"]),
        Case(
            name: "a stray table", options: "cluster_size=4k", size: "8M",
            writes: ["write -P 1 0 128k", "write -P 2 7M 64k"],
            damage: { try $0.setWord(24, 3 << 20) },
            ways: ["8M", "--preallocation=metadata 8M", "--shrink 1M", "--shrink 1M 8M"]),
    ]

    @Test(arguments: accepted)
    func keepsTheDisk(_ item: Case) throws {
        for way in item.ways {
            try make(item)
            let before = try guest()
            let options = way.words.filter { $0.hasPrefix("--") }
            for size in way.words.filter({ !$0.hasPrefix("--") }) {
                let outcome = try run(
                    Swimg.path, ["resize"] + options + [image, size])
                #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(way): \(outcome)")
                #expect(try Qemu.damage(image) == nil, "\(way): \(outcome)")
                let after = try guest()
                let kept = min(before.count, after.count)
                let difference = mismatch(after.prefix(kept), before.prefix(kept))
                // After two sizes, the data between the smaller one and the old end is lost.
                if size == way.words.first(where: { !$0.hasPrefix("--") }) {
                    #expect(difference == nil, "\(way): \(outcome)")
                }
                #expect(after.dropFirst(kept).allSatisfy { $0 == 0 }, "\(way): \(outcome)")
            }
        }
    }

    /// The first bytes of the guest disk.
    private func guest() throws -> Data {
        let raw = folder.path("content")
        try Qemu.img("convert", "-f", "qcow2", "-O", "raw", image, raw)
        defer { try? FileManager.default.removeItem(atPath: raw) }
        let size = try #require(FileStatus(raw)).size
        return Data(try contents(raw, at: 0, count: Int(min(size, 16 << 20))))
    }

    /// A resize that fails at any write before the header keeps the file's length and the disk.
    @Test(
        .enabled(if: canTraceSystemCalls, "strace lets a certain write fail"),
        arguments: ["20M", "100G", "--preallocation=metadata 3M", "--preallocation=metadata 3G"])
    func aFailedGrowLeavesTheLength(_ way: String) throws {
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "1000448")
        try Qemu.io("qcow2", image, ["write -P 1 0 1000448"])
        let before = try contents(image)
        var failures = 0
        for number in 1...40 {
            let copy = folder.path("copy")
            try before.write(to: URL(fileURLWithPath: copy))
            let outcome = try run(
                "strace",
                ["-f", "-qq", "-o", "/dev/null", "-e", "trace=pwritev", "-e"]
                    + ["inject=pwritev:error=ENOSPC:when=\(number)", Swimg.path, "resize", "-f"]
                    + ["qcow2"] + way.words.dropLast() + [copy] + way.words.suffix(1))
            guard !outcome.isSuccess else { break }
            let state = try run("qemu-img", ["check", "-f", "qcow2", copy])
            #expect([0, 3].contains(state.status), "\(number): \(outcome)\n\(state)")
            let fields = try Qcow2Fields(copy)
            // An image whose resize failed after the header was written has the new size.
            guard fields.virtualSize == 1_000_448 else { continue }
            failures += 1
            let difference = try mismatch(contents(copy), before)
            #expect(difference == nil, "\(number): \(outcome)")
        }
        #expect(failures > 1)
    }
}
