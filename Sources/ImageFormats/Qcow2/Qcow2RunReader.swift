import DiskImage
import ImageStorage

/// The runs of a qcow2 image, zero and unallocated ones with their places in the file.
final class Qcow2RunReader: StoredRunReader {
    private let source: Qcow2Source
    private let allocation: StorageAllocation
    /// The entries read last: most runs are told of by the same ones as the run before.
    private var entries = Qcow2Tables.Entries(words: [], range: 0..<0)
    /// Found out when first needed.
    private var isPreallocated: Bool?

    init(_ source: Qcow2Source) {
        self.source = source
        allocation = StorageAllocation(source.storage)
    }

    func load(at offset: Int64, limit: Int64) async throws {
        if isPreallocated == nil {
            isPreallocated = try await source.isPreallocated()
        }
        entries = try await source.tables.entries(at: offset, limit: limit)
    }

    func run(at offset: Int64, limit: Int64) throws -> StoredRun? {
        guard entries.range.contains(offset) else { return nil }
        guard !entries.words.isEmpty else {
            return StoredRun(
                range: offset..<min(limit, entries.range.upperBound), content: .unallocated)
        }
        let run = try source.tables.decoder.storedRun(
            in: entries.words, startingAt: entries.range.lowerBound, from: offset, limit: limit)
        return run.content == .data && isPreallocated == true ? lookingBelow(run) : run
    }

    /// Looks for holes under allocated clusters, as qemu does: only where the file takes clearly
    /// less space than its clusters do. Elsewhere it would be a system call for each run and no
    /// news.
    private func lookingBelow(_ run: StoredRun) -> StoredRun {
        guard let host = run.hostOffset else { return run }
        let size = source.storage.size
        let count = Int64(run.range.count)
        let piece =
            HostPiece(
                at: host, count: count, behindEnd: size, clusterSize: source.readGranularity)
            ?? allocation.extent(at: host, limit: min(host + count, size)).map(HostPiece.init)
        guard let piece else { return run }
        var result = run
        result.range = run.range.lowerBound..<run.range.lowerBound + piece.count
        if piece.content != .data { result.content = .preallocated }
        return result
    }
}

extension Qcow2EntryDecoder {
    /// The longest run from `offset` on that these entries tell of; parameters as of `run`.
    ///
    /// Compressed clusters of any number are one run.
    func storedRun(
        in words: [UInt64], startingAt wordsStart: Int64, from offset: Int64, limit: Int64
    ) throws(ImageError) -> StoredRun {
        let first = try state(words, wordsStart, offset)
        let end = min(
            limit,
            wordsStart + Int64(words.count) / geometry.wordsPerL2Entry * geometry.clusterSize)
        let position =
            geometry.hasExtendedL2
            ? try endOfSubclusters(first, words, wordsStart, offset, end)
            : endOfClusters(first, words, wordsStart, offset)
        let range = offset..<min(position, end)
        switch first {
        case .unallocated(let host):
            return StoredRun(range: range, content: .unallocated, hostOffset: host?.bytes)
        case .zero(let host):
            return StoredRun(range: range, content: .zero, hostOffset: host?.bytes)
        case .standard(let host):
            return StoredRun(range: range, content: .data, hostOffset: host.bytes)
        case .compressed: return StoredRun(range: range, content: .compressed)
        }
    }

    private func endOfSubclusters(
        _ first: Qcow2EntryState, _ words: [UInt64], _ wordsStart: Int64, _ offset: Int64,
        _ end: Int64
    ) throws(ImageError) -> Int64 {
        let step = geometry.subclusterSize
        var position = (offset + 1).roundedUp(to: step)
        while position < end {
            let next = try state(words, wordsStart, position)
            guard Self.continues(first, by: position - offset, with: next) else { break }
            position += step
        }
        return position
    }

    private static func continues(
        _ first: Qcow2EntryState, by distance: Int64, with next: Qcow2EntryState
    ) -> Bool {
        switch (first, next) {
        case (.compressed, .compressed): true
        case (.standard(let start), .standard(let host)): host == start + distance
        case (.zero(let start), .zero(let host)),
            (.unallocated(let start), .unallocated(let host)):
            host == start.map { $0 + distance }
        default: false
        }
    }

    /// Without looking at the parts of each entry: an image of terabytes has millions of them. What
    /// comes next is the first word again, or one cluster further.
    private func endOfClusters(
        _ first: Qcow2EntryState, _ words: [UInt64], _ wordsStart: Int64, _ offset: Int64
    ) -> Int64 {
        let start = Int((offset - wordsStart) / geometry.clusterSize)
        var index = start + 1
        if case .compressed = first {
            while index < words.count, words[index] & Qcow2Entry.compressed != 0 { index += 1 }
        } else {
            let word = words[start] & ~Qcow2Entry.copied
            let hasHost = word & Qcow2Entry.offsetMask != 0
            let step = hasHost ? UInt64(geometry.clusterSize) : 0
            var expected = word &+ step
            while index < words.count, words[index] & ~Qcow2Entry.copied == expected {
                index += 1
                expected &+= step
            }
        }
        return wordsStart + Int64(index) * geometry.clusterSize
    }
}
