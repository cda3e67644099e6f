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
        try await counts.release([first])
        #expect(try await counts.count(of: first) == 0)
        await #expect(throws: ImageError.self) { try await counts.release([first]) }
        await #expect(throws: ImageError.self) { try await counts.release([0]) }
        #expect(!counts.hasNewSingles)
    }

    /// Free clusters come first, as many as lie in a row, and then those behind the end.
    @Test func takenClustersFillGaps() async throws {
        let storage = try await emptyImage(bits: 16)
        let end = storage.size / 512
        var counts = try await refcounts(of: storage)
        let first = try await counts.allocate(10)
        try await counts.release([2, 3, 7].map { first + $0 })
        #expect(try await counts.take(upTo: 8) == first + 2..<first + 4)
        #expect(try await counts.take(upTo: 1) == first + 7..<first + 8)
        #expect(try await counts.take(upTo: 3) == first + 10..<first + 13)
        try await counts.release([first + 5])
        #expect(try await counts.take(upTo: 3) == first + 5..<first + 6)
        #expect(try await counts.count(of: first + 11) == 1 && end <= first)
    }

    /// Published counts are in the file, by the table that the header names.
    @Test(arguments: [3, 200, 40000])
    func publishedCountsAreInTheFile(_ count: Int64) async throws {
        let storage = try await emptyImage(bits: 16)
        var (image, counts) = try await Qcow2WritableImage.sound(
            storage, try await Qcow2Header.read(from: storage))
        let first = try await counts.takeInARow(count)
        _ = try await counts.raise([first])
        try await counts.publish(in: &image)
        let header = try await Qcow2Header.read(from: storage)
        var read = RefcountCache(try await RefcountReader(reading: storage, header))
        #expect(try await read.refcount(of: Int(first)) == 2)
        for cluster in first + 1..<first + count {
            #expect(try await read.refcount(of: Int(cluster)) == 1)
        }
        #expect(header.refcountTableOffset == counts.place.offset)
        // Nothing but what was taken is in use without a reference.
        try await counts.release(Array(first..<first + count) + [first])
        try await counts.flush()
        let sound = try await SoundImage(storage)
        #expect(sound.header == header)
    }

    /// Until the header is switched, the file counts what it counted before.
    @Test(arguments: [1, 16])
    func deferredChangesLeaveTheOldCounts(_ bits: Int) async throws {
        let storage = try await emptyImage(bits: bits)
        var (image, counts) = try await Qcow2WritableImage.sound(
            storage, try await Qcow2Header.read(from: storage))
        let kept = try await counts.takeInARow(6)
        try await counts.publish(in: &image)
        let (header, before) = (image.header, storage.bytes)
        let old = counts.place
        counts.deferChanges()
        try await counts.release([kept])
        if bits > 1 { #expect(try await counts.raise([kept + 1])) }
        let taken = try await counts.takeInARow(700)
        #expect(taken > kept + 5)
        try await counts.settle()
        #expect(storage.bytes.prefix(before.count).elementsEqual(before))
        try await image.changeHeader { [place = counts.place] in
            $0.refcountTableOffset = place.offset
            $0.refcountTableClusters = place.clusters
        }
        try await counts.finishSwitch(from: old)
        #expect(image.header != header)
        var read = RefcountCache(try await RefcountReader(reading: storage, image.header))
        #expect(try await read.refcount(of: Int(kept)) == 0)
        #expect(try await read.refcount(of: Int(kept) + 1) == (bits > 1 ? 2 : 1))
        #expect(try await read.refcount(of: Int(taken) + 699) == 1)
        #expect(try await read.refcount(of: Int(old.offset.bytes / 512)) == 0)
    }
}
