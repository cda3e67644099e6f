import Foundation
import TestSupport
import Testing

/// A repair that cannot improve an image leaves it unchanged; memory depends on the tables' size.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct DamagedCheckTests {
    private let folder: TempFolder
    private var image: String { folder.path("image") }

    init() throws { folder = try TempFolder() }

    private func make(_ options: String, _ size: String = "1M", _ writes: [String] = []) throws {
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", options, image, size)
        try Qemu.io("qcow2", image, writes)
    }

    private func expectUnchangedByRepair(_ what: String = "all") throws {
        let before = try contents(image)
        let outcome = try run(Swimg.path, ["check", "-r", what, image])
        #expect(outcome.status == 1, "\(outcome)")
        let last = outcome.errorText.split(separator: "\n").last ?? ""
        #expect(last.hasPrefix(Swimg.prefix), "\(outcome)")
        let difference = try mismatch(contents(image), before)
        #expect(difference == nil, "\(outcome)")
    }

    /// New refcounts would be written where the tables were that the file has lost.
    @Test(arguments: [8191, 4096, 8192, 4097])
    func tablesBehindTheEnd(_ length: Int) throws {
        try make("cluster_size=4k,compat=0.10")
        try Qcow2Patcher(image).truncate(to: length)
        try expectUnchangedByRepair()
    }

    /// An L1 table longer than the file is not counted, so its clusters look free. New refcounts
    /// must not be placed there, and its refcount must not become 0.
    @Test(arguments: ["all", "leaks"])
    func anL1TableThatReachesBehindTheEnd(_ what: String) throws {
        for rebuilds in [false, true] {
            try make("cluster_size=512", "300k")
            let patcher = try Qcow2Patcher(image)
            try patcher.write([0, 0, 0xcf, 0x0a], at: 36)
            if rebuilds { try patcher.change(patcher.refcountTable) { $0 | 1 } }
            try expectUnchangedByRepair(what)
            let outcome = try run(Swimg.path, ["resize", "-f", "qcow2", image, "400k"])
            #expect(outcome.status == 1, "\(outcome)")
        }
    }

    /// A stream whose last sector would lie after the end of the file also looks uncounted; nothing
    /// may overwrite its start.
    @Test func aStreamThatEndsBehindTheEnd() throws {
        try make("cluster_size=512", "64k", ["write -P 1 0 512", "write -c -P 2 512 512"])
        let patcher = try Qcow2Patcher(image)
        // One cluster is free for a new refcount block; the refcount table would be placed at the
        // stream.
        try patcher.setWord(patcher.l2Entry(0), 0)
        // One sector more than the stream has.
        try patcher.change(patcher.l2Entry(1)) { $0 | 1 << 61 }
        try patcher.change(patcher.refcountTable) { $0 | 1 }
        let before = try Swimg.convert("-f", "qcow2", "-O", "raw", image, folder.path("before"))
        #expect(before.isSuccess, "\(before)")
        let outcome = try run(Swimg.path, ["check", "-r", "all", image])
        let after = try Swimg.convert("-f", "qcow2", "-O", "raw", image, folder.path("after"))
        #expect(after.isSuccess, "\(outcome)\n\(after)")
        let difference = try mismatch(
            contents(folder.path("before")), contents(folder.path("after")))
        #expect(difference == nil, "\(outcome)")
    }

    /// Changing the flags of entries would overwrite other data in that cluster.
    @Test func sharedL1Table() throws {
        try make("cluster_size=64k", "1M", ["write -P 1 0 128k"])
        let patcher = try Qcow2Patcher(image)
        try patcher.setWord(patcher.l1, 1 << 63 | UInt64(patcher.l1))
        try expectUnchangedByRepair()
    }

    /// A refcount of one bit cannot express that a refcount block is also data.
    @Test func sharedRefcountBlock() throws {
        try make("cluster_size=64k,refcount_bits=1", "1M", ["write -P 1 0 128k"])
        let patcher = try Qcow2Patcher(image)
        try patcher.setWord(
            patcher.l2Entry(1), 1 << 63 | patcher.word(patcher.refcountTable))
        let before = try contents(image)
        let outcome = try run(Swimg.path, ["check", "-r", "leaks", image])
        #expect(outcome.status == 1, "\(outcome)")
        let difference = try mismatch(contents(image), before)
        #expect(difference == nil, "\(outcome)")
    }

    /// The L2 table is also a data cluster: changing the flags of its entries would change the
    /// data.
    @Test(arguments: ["cluster_size=64k", "cluster_size=64k,refcount_bits=1"])
    func anL2TableThatIsData(_ options: String) throws {
        try make(options, "1M", ["write -P 1 0 128k"])
        let patcher = try Qcow2Patcher(image)
        try patcher.setWord(patcher.l2Entry(1), patcher.word(patcher.l1))
        let table = Int(try patcher.word(patcher.l1) & ~(1 << 63))
        let before = try contents(image, at: Int64(table), count: 65536)
        let outcome = try run(Swimg.path, ["check", "-r", "all", image])
        #expect(outcome.status != 0, "\(outcome)")
        let after = try contents(image, at: Int64(table), count: 65536)
        #expect(mismatch(after, before) == nil, "\(outcome)")
    }

    /// A repairable entry in a table that must not be written still references its clusters.
    @Test func repairsThatCannotBeWritten() throws {
        try make("cluster_size=4k,preallocation=metadata", "2M")
        let patcher = try Qcow2Patcher(image)
        let entry = try patcher.l2Entry(300)
        let host = try patcher.word(entry) & 0x00ff_ffff_ffff_fe00
        try patcher.setWord(entry, host + 512 | 1)
        // The table is also a data cluster.
        try patcher.setWord(patcher.l2Entry(400), patcher.word(patcher.l1))
        let before = try lowRefcounts()
        let outcome = try run(Swimg.path, ["check", "-r", "all", image])
        #expect(outcome.status == 2, "\(outcome)")
        let after = try lowRefcounts()
        #expect(before > 0 && after == 0, "\(before) \(after) \(outcome)")
    }

    /// The number of clusters whose refcount is too low according to qemu-img.
    private func lowRefcounts() throws -> Int {
        try run("qemu-img", ["check", image]).errorText.split(separator: "\n")
            .count { $0.hasPrefix("ERROR cluster") }
    }

    /// A file that ends within a sector counts as ending at the end of that sector.
    @Test(arguments: [131_080, 131_081, 131_584, 196_609, 131_072])
    func lengthsWithinASector(_ length: Int) throws {
        try make("cluster_size=64k")
        try Qcow2Patcher(image).truncate(to: length)
        let theirs = try run("qemu-img", ["check", image])
        let ours = try run(Swimg.path, ["check", image])
        #expect(ours.status == theirs.status, "\(ours)\n\(theirs)")
        #expect(ours.outputText == theirs.outputText, "\(ours)\n\(theirs)")
    }

    /// A few entries that name distant clusters: memory must depend on the entries, not on the
    /// file.
    @Test(.enabled(if: hasProgram("time"))) func memoryGoesWithTheTables() throws {
        try make("cluster_size=512", "4M")
        let patcher = try Qcow2Patcher(image)
        let tables = 128
        let first = 1 << 20
        let distance = 16 << 20
        for table in 0..<tables {
            try patcher.setWord(
                patcher.l1 + table * 8, 1 << 63 | UInt64(first + table * 512))
            let entries = (0..<64).map { UInt64(distance * (table * 64 + $0 + 1)) }
            let bytes = entries.flatMap { entry in
                (0..<8).map { UInt8(truncatingIfNeeded: entry >> (56 - 8 * UInt64($0))) }
            }
            try patcher.write(bytes, at: first + table * 512)
        }
        try patcher.truncate(to: distance * (tables * 64 + 1))
        let outcome = try run("time", ["-f", "%M", Swimg.path, "check", "-q", image])
        let peak = outcome.errorText.split(separator: "\n").last.flatMap { Int($0) }
        // 64 KiB for each of 8192 entries would be 512 MiB.
        #expect(try #require(peak) < 64 << 10, "KiB")
    }
}
