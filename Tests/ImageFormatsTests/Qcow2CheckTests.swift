import DiskImage
import ImageStorage
import MemoryImages
import Synchronization
import Testing

@testable import ImageFormats

@Suite struct Qcow2CheckTests {
    @Test(arguments: [1, 2, 4, 8, 16, 32, 64])
    func refcountsOfEveryWidth(bits: Int) {
        var block = RefcountBlock(bits: bits, byteCount: 512)
        let highest = bits == 64 ? UInt64.max : (1 << UInt64(bits)) - 1
        #expect(block.count == 4096 / bits && block.maximum == highest)
        func value(_ index: Int) -> UInt64 {
            (UInt64(index) &* 0x9e37_79b9_7f4a_7c15 >> 7) & highest
        }
        for index in 0..<4096 / bits { block[index] = value(index) }
        block[3] = highest
        block[5] = 0
        var used: Int64 = 0
        for index in 0..<4096 / bits {
            let expected = index == 3 ? highest : index == 5 ? 0 : value(index)
            #expect(block[index] == expected)
            if index < 60, expected != 0 { used += 1 }
        }
        #expect(block.countUsed(first: 60) == used)
        #expect(RefcountBlock(bits: bits, bytes: []).countUsed(first: 60) == 0)
        // The order within a byte, and of bytes, as the specification has it.
        var fresh = RefcountBlock(bits: bits, byteCount: 16)
        fresh[1] = 1
        #expect(bits < 8 ? fresh.bytes[0] == 1 << UInt8(bits) : fresh.bytes[2 * bits / 8 - 1] == 1)
    }

    @Test func countsGoBeyondTheirBits() {
        var counts = ReferenceCounts(clusterCount: 100_000, refcountBits: 16)
        let run = ClusterRun(cluster: 32767, count: 2, mark: .copied)
        var overflows: [Int] = []
        for _ in 0..<65537 { counts.add([run]) { overflows.append($0) } }
        #expect(counts[32766] == 0 && counts[32767] == 65535 && counts[32768] == 65535)
        #expect(overflows == [32767, 32768, 32767, 32768])
        #expect(counts.chunk(2).isEmpty, "nothing is allocated where nothing is counted")
    }

    @Test func countsOfOneBit() {
        var counts = ReferenceCounts(clusterCount: 10, refcountBits: 1)
        var overflows: [Int] = []
        let single = ClusterRun(cluster: 4, count: 1, mark: .shared)
        counts.add([single, single]) { overflows.append($0) }
        #expect(counts[4] == 1 && overflows == [4])
        counts.add([ClusterRun(cluster: 9, count: 3, mark: .none)]) { _ in }
        #expect(counts.clusterCount == 12 && counts[11] == 1)
        #expect(counts.firstFree(2, from: 3, avoiding: [6]) == 7)
        #expect(counts.firstFree(3, from: 3, avoiding: [6]) == 12)
    }

    /// New blocks and the table count themselves, however the places make them grow.
    @Test(arguments: [1, 2, 63, 64, 65, 4095, 4096, 5000], [1, 16, 64])
    func newRefcountsCountThemselves(used: Int, bits: Int) {
        let clusterSize: Int64 = 512
        let perBlock = RefcountBlock.count(bits: bits, byteCount: Int(clusterSize))
        var counts = ReferenceCounts(clusterCount: used, refcountBits: bits)
        counts.add([ClusterRun(cluster: 0, count: used, mark: .none)]) { _ in }
        let layout = RefcountLayout(
            &counts, blockEntries: perBlock, clusterSize: clusterSize, avoiding: [used + 1])
        let table = layout.tableCluster..<layout.tableCluster + layout.tableClusters
        let all = layout.blocks.map(\.cluster) + Array(table)
        #expect(Set(all).count == all.count)
        #expect(all.allSatisfy { $0 >= used && $0 != used + 1 && counts[$0] == 1 })
        let indices = Set(layout.blocks.map(\.index))
        #expect((0..<layout.end).allSatisfy { counts[$0] == 0 || indices.contains($0 / perBlock) })
        #expect(table.count == Int((indices.max() ?? 0) + 1).dividedUp(by: 64))
    }

    /// A repair that ends after any of its writes leaves an image that is no worse: no more
    /// refcounts are too low. The flags that follow from them come after them.
    @Test(arguments: ["rebuild", "raise", "leak", "flag"])
    func repairMayEndAnywhere(_ damage: String) async throws {
        let sound = try await image()
        var bytes = sound.bytes
        func number(_ at: Int) -> Int { bytes[at..<at + 8].reduce(0) { $0 << 8 | Int($1) } }
        let l1 = number(40)
        let l2 = number(l1) & 0xff_ffff_fe00
        let block = number(number(48))
        switch damage {
        case "rebuild": bytes[number(48) + 6] = 0xff
        case "raise": bytes.replaceSubrange(l2..<l2 + 8, with: bytes[l2 + 8..<l2 + 16])
        case "leak": bytes[block + 5] = 7
        default: bytes[l2] &= 0x7f
        }
        bytes[79] |= 1
        let before = try await check(MemoryStorage(bytes))
        #expect(before.result.corruptions + before.result.leaks > 0)
        var isWhole = false
        for step in 0..<1000 where !isWhole {
            let storage = MemoryStorage(bytes)
            storage.fail(at: step)
            do {
                _ = try await check(storage, repair: .all)
                isWhole = true
            } catch {
                #expect("\(error)" == "\(MemoryStorage.failure)")
            }
            let after = try await check(MemoryStorage(storage.bytes))
            #expect(after.errors <= before.errors, "after \(step) operations")
            guard isWhole else { continue }
            #expect(after.result.corruptions == 0 && after.result.leaks == 0)
            #expect(storage.bytes[79] & 1 == 0, "the dirty bit is cleared")
        }
        #expect(isWhole)
    }

    /// - Returns: with the number of errors told of, those of flags aside.
    private func check(
        _ storage: MemoryStorage, repair: CheckRepair? = nil
    ) async throws -> (result: CheckResult, errors: Int) {
        let errors = Counter()
        let note: @Sendable (String) -> Void = { text in
            if text.hasPrefix("ERROR"), !text.contains("OFLAG_COPIED") { errors.add() }
        }
        let checker = Qcow2ImageChecker()
        let result =
            if let repair {
                try await checker.repair(storage, repair, onMessage: note)
            } else {
                try await checker.check(storage, onMessage: note)
            }
        return (result, errors.value)
    }

    /// Eight clusters of 512 bytes with data.
    private func image() async throws -> MemoryStorage {
        let storage = MemoryStorage()
        var options = Qcow2Options()
        options.clusterSize = 512
        let target = try Qcow2Target(
            storage: storage, virtualSize: 8 * 512, options: options, compress: false,
            minSparse: 512)
        var data = try IOBuffer(byteCount: 8 * 512)
        var span = data.mutableBytes
        span.withUnsafeMutableBytes { $0.copyBytes(from: [UInt8](repeating: 1, count: 8 * 512)) }
        var encoded = try IOBuffer(byteCount: 512)
        var room = encoded.mutableBytes
        var used = 0
        let pieces = try target.encode(
            data.bytes, positions: 0..<8 * 512, at: 0, into: &room, used: &used)
        try await target.write(
            try target.place(pieces, encoded: encoded.bytes), data: data.bytes, origin: .nowhere)
        try await target.finish(virtualSize: 8 * 512)
        return storage
    }
}

private final class Counter: Sendable {
    private let count = Atomic<Int>(0)

    var value: Int { count.load(ordering: .relaxed) }

    func add() { count.add(1, ordering: .relaxed) }
}
