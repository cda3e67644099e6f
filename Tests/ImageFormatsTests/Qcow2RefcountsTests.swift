import DiskImage
import ImageStorage
import MemoryImages
import Testing

@testable import ImageFormats

/// The refcounts of an image that is changed in place, in memory: small clusters make small blocks,
/// so that a few allocations need new blocks and a new table.
@Suite struct Qcow2RefcountsTests {
    private func emptyImage(bits: Int) async throws -> MemoryStorage {
        let storage = MemoryStorage()
        var options = Qcow2Options()
        options.clusterSize = 512
        options.refcountBits = bits
        let target = try Qcow2Target(
            storage: storage, virtualSize: 64 << 10, options: options, compress: false,
            minSparse: 512, writesData: false)
        try await target.prepare()
        try await target.finish(virtualSize: 64 << 10)
        return storage
    }

    private func refcounts(of storage: MemoryStorage) async throws -> Qcow2Refcounts {
        try Qcow2Refcounts(try await SoundImage(storage), storage: storage)
    }

    @Test(arguments: [1, 16, 64])
    func allocatedClustersAreCounted(_ bits: Int) async throws {
        let storage = try await emptyImage(bits: bits)
        let end = storage.size / 512
        var counts = try await refcounts(of: storage)
        let perBlock = Int64(512 * 8 / bits)
        let first = try await counts.allocate(3 * perBlock)
        #expect(first >= end)
        for cluster in [first, first + 1, first + 3 * perBlock - 1] {
            #expect(try await counts.count(of: cluster) == 1)
        }
        // New blocks count themselves, in front of what was asked for.
        for cluster in end..<first { #expect(try await counts.count(of: cluster) == 1) }
        #expect(storage.size == (first + 3 * perBlock) * 512)
    }

    /// After settling, a reader of the new table finds every count.
    @Test(arguments: [1, 16, 64])
    func settledCountsAreInTheFile(_ bits: Int) async throws {
        let storage = try await emptyImage(bits: bits)
        var counts = try await refcounts(of: storage)
        let first = try await counts.allocate(1000)
        try await counts.settle()
        var header = try await Qcow2Header.read(from: storage)
        header.refcountTableOffset = counts.place.offset
        header.refcountTableClusters = counts.place.clusters
        var read = RefcountCache(try await RefcountReader(reading: storage, header))
        for cluster in first..<first + 1000 {
            #expect(try await read.refcount(of: Int(cluster)) == 1)
        }
        for cluster in 0..<counts.place.clusters {
            let own = counts.place.offset.bytes / 512 + cluster
            #expect(try await read.refcount(of: Int(own)) == 1, "the table counts itself")
        }
    }

    /// Whatever was allocated and settled: nothing leads to it, so it can be taken back to the
    /// byte.
    @Test(arguments: [1, 10, 300, 5000], [false, true])
    func rollingBackLeavesTheOldImage(_ count: Int64, _ isSettled: Bool) async throws {
        let storage = try await emptyImage(bits: 16)
        let before = storage.bytes
        var counts = try await refcounts(of: storage)
        _ = try await counts.allocate(count)
        if isSettled { try await counts.settle() }
        try await counts.rollBack()
        #expect(storage.bytes == before)
    }

    /// The storage fails at each operation in turn: what stands before the header's switch can be
    /// taken back.
    @Test func failuresCanBeRolledBack() async throws {
        var failures = 0
        for number in 0..<60 {
            let storage = try await emptyImage(bits: 16)
            let before = storage.bytes
            var counts = try await refcounts(of: storage)
            storage.fail(at: number)
            do {
                _ = try await counts.allocate(600)
                try await counts.settle()
            } catch {
                failures += 1
                try await counts.rollBack()
                #expect(storage.bytes == before, "operation \(number)")
            }
        }
        #expect(failures > 3)
    }

    @Test func loweringFreesAndTellsOfSingles() async throws {
        let storage = try await emptyImage(bits: 16)
        var counts = try await refcounts(of: storage)
        let first = try await counts.allocate(2)
        #expect(try await counts.lower(first))
        #expect(try await counts.count(of: first) == 0)
        await #expect(throws: ImageError.self) { _ = try await counts.lower(first) }
        await #expect(throws: ImageError.self) { _ = try await counts.lower(0) }
        #expect(!counts.hasNewSingles)
    }
}
