import Concurrency
import DiskImage
import ImageStorage

/// The engine: copies a guest disk from a source to a target in three stages.
///
///     ExtentIterator ──chunk──▶ ReadStage ──pieces──▶ WriteStage
///     one, walks the source     several at once,      places in guest order,
///     and cuts it into chunks   each with a buffer    writes in order or not
///
/// Data that a raw target can share with the source passes through `ShareStage` instead of the last
/// two.
///
/// A worker takes a chunk through all three stages before it takes the next. The `Window` decides
/// how many chunks are in flight and how long they are, which bounds the memory.
public struct Pipeline: Sendable {
    /// Length of a chunk in bytes: long enough for large folios in the page cache and for storage
    /// where each request waits.
    public static let defaultChunk: Int64 = 2 << 20
    /// Length of a chunk that is compressed, in bytes; longer ones would only cost memory.
    public static let chunkToCompress: Int64 = 64 << 10
    /// Longest part of a chunk that is decompressed, in bytes, if the source reads ahead: all
    /// chunks in flight have to lie within what has been read ahead.
    private static let chunkReadAhead: Int64 = 448 << 10
    /// Default limit for all buffers together, in bytes.
    public static let defaultMemory: Int64 = 64 << 20

    /// Number of chunks in flight if copying is the work.
    public var baseWorkers: Int
    /// Number of chunks in flight if the storage waits; nil allows as many as fit into `memory`.
    public var mostWorkers: Int?
    /// Limit for all buffers together, in bytes.
    public var memory: Int64 = Self.defaultMemory
    /// Meters of the storages that are read and written, by which the window finds its size.
    public var readMeters: [CallMeter] = []
    public var writeMeter: CallMeter?
    /// Length of a chunk in bytes, unless the target compresses. Shorter where memory is short,
    /// longer where the storage waits and few chunks are allowed.
    public var chunkSize = Self.defaultChunk
    /// Whether the source reads ahead for short reads that follow each other. Chunks that have to
    /// be decompressed are kept short then.
    public var readsAhead = false
    /// Whether writes begin in guest order; false is `-W`.
    public var writesInOrder: Bool
    /// Largest number of bytes copied per second; nil has no limit.
    public var bytesPerSecond: Int64?
    /// Whether ordered writes only begin in order; a stream takes one after the other.
    public var writesOverlap = true
    /// Zeros are stored like data (`-S 0`).
    public var storesZeros: Bool
    /// Compute digests of the disk during the copy.
    public var digests: [DigestStage] = []
    /// The disk that the target shows already: where it equals the source, nothing is written. All
    /// of it is as long as the source; nil compares nothing.
    public var shown: (any ImageSource)?
    /// Called when all has been copied, before the target is completed; throws if the source turns
    /// out to be wrong.
    public var checkSource: @Sendable () async throws -> Void = {}
    /// Called now and then, from any task, with the number of bytes done. The last of them may
    /// still be in flight, and those in flight count half.
    public var onProgress: (@Sendable (_ done: Int64) -> Void)?

    public init(
        baseWorkers: Int = 8, writesInOrder: Bool = true, storesZeros: Bool = false,
        onProgress: (@Sendable (_ done: Int64) -> Void)? = nil
    ) {
        self.baseWorkers = baseWorkers
        self.writesInOrder = writesInOrder
        self.storesZeros = storesZeros
        self.onProgress = onProgress
    }

    /// Finds out what `copy` will do, from mappings alone.
    ///
    /// - Throws: `ImageError` if the source cannot tell its mappings, or if memory is short.
    func plan(
        _ extents: any ImageSource, for target: any ImageTarget
    ) async throws -> DiskPlan {
        let granularity = target.traits.granularity
        let iterator = ExtentIterator(
            source: extents,
            policy: CopyPolicy(target: target.traits, storesZeros: storesZeros),
            granularity: granularity,
            chunkSize: Self.defaultChunk.roundedUp(to: granularity))
        var plan = DiskPlan()
        while let chunk = try await iterator.next() {
            try MemoryMargin.check()
            for segment in chunk.segments where segment.action != .skip {
                let end = segment.range.upperBound.roundedUp(to: granularity)
                plan.append(
                    DiskPlan.Range(
                        guest: segment.range.lowerBound..<end,
                        isStored: segment.action == .copy))
            }
        }
        return plan
    }

    /// Copies all of the source; the target is complete on return.
    ///
    /// - Parameter extents: source of the mappings that decide what is copied. For a target with a
    ///   backing file that is the source's top layer alone, otherwise the source itself.
    /// - Throws: the first error of any stage, or `CancellationError`; the target is worthless
    ///   then.
    public func copy(
        from source: any ImageSource, extents: any ImageSource, to target: any ImageTarget
    ) async throws {
        let granularity = target.traits.granularity
        let smallest = max(Self.chunkToCompress, granularity, source.readGranularity)
        // A file without holes may store zeros, so its data is read and searched.
        let sharesUnread =
            digests.isEmpty && target.sharesUnread ? try await source.isSparse() : false
        // Compressed clusters and bytes to compare with need further buffers for each chunk.
        let buffers: Int64 = 1 + (target.compresses ? 1 : 0) + (shown == nil ? 0 : 1)
        let fair = memory / buffers / Int64(min(baseWorkers, mostWorkers ?? baseWorkers))
        // Chunks are whole clusters, whatever length a server prefers and memory allows.
        let chunkSize =
            target.compresses
            ? smallest
            : max(
                smallest,
                min(self.chunkSize.roundedUp(to: smallest), fair.roundedDown(to: smallest)))
        let bounds = Window.Bounds(
            base: baseWorkers, limit: mostWorkers, memory: memory / buffers,
            unit: smallest, shortChunk: chunkSize)
        let longestCompressed = readsAhead ? Self.chunkReadAhead.roundedUp(to: smallest) : nil
        let iterator = ExtentIterator(
            source: extents,
            policy: CopyPolicy(target: target.traits, storesZeros: storesZeros),
            granularity: granularity, chunkSize: chunkSize,
            // Long blocks are hashed in parallel only if chunks are whole blocks.
            gridStart: digests.contains { $0.blockSize > smallest } ? 0 : smallest % chunkSize,
            longestCompressed: longestCompressed,
            sharesUnread: { sharesUnread && target.sharesUnread })
        let stages = Stages(
            reading: ReadStage(
                source: source, extents: extents, target: target, shown: shown),
            sharing: ShareStage(extents: extents, target: target),
            writing: WriteStage(
                extents: extents, target: target, isOrdered: writesInOrder,
                overlaps: writesOverlap),
            digests: digests, longestCompressed: longestCompressed,
            rate: bytesPerSecond.map(RateLimit.init))
        let window = WindowGate(bounds, meters: readMeters + (writeMeter.map { [$0] } ?? []))
        let progress = ProgressMark(onProgress)

        try await IOExecutor.run {
            try await withThrowingTaskGroup(of: Void.self) { group in
                // A small image is done before a second thread has begun.
                for _ in 0..<min(Int64(bounds.most), source.virtualSize / chunkSize + 1) {
                    group.addTask {
                        while true {
                            var pass = await window.enter()
                            guard let chunk = try await iterator.next(upTo: pass.chunkSize)
                            else { break }
                            if chunk.isCompressed { pass.noteCompressed() }
                            // Not the last byte: the disk is done when the target is finished.
                            let end = min(chunk.end, source.virtualSize - 1)
                            progress.begin(end)
                            do {
                                let rest = try await stages.carry(chunk, with: &pass)
                                if chunk.isShared { await iterator.takeBack(rest) }
                            } catch {
                                if chunk.isShared { await iterator.takeBack([]) }
                                throw error
                            }
                            progress.reach(end)
                        }
                    }
                }
                // The first error leaves the group, which cancels and awaits the other workers;
                // `waitForAll` would wait for them without cancelling.
                for try await _ in group {}
            }
            try Task.checkCancellation()
            try await checkSource()
            for digest in digests { try await digest.finish(at: source.virtualSize) }
            try await target.finish(virtualSize: source.virtualSize)
        }
        progress.reach(source.virtualSize)
    }
}

/// The stages that a worker carries a chunk through.
private struct Stages: Sendable {
    let reading: ReadStage
    let sharing: ShareStage
    let writing: WriteStage
    let digests: [DigestStage]
    /// Limit for the compressed data of a chunk, in guest bytes; nil if there is none.
    let longestCompressed: Int64?
    let rate: RateLimit?
    /// Buffers for guest bytes, and for compressed clusters.
    private let dataPool = IOBufferPool()
    private let encodedPool = IOBufferPool()

    /// - Returns: the mappings of a shared chunk that have to be copied after all.
    func carry(
        _ chunk: Chunk, with pass: inout WindowPass
    ) async throws -> [Mapping] {
        guard !chunk.isShared else {
            return try await writing.inTurn(of: chunk) { sharing.share(chunk) }
        }
        let length = chunk.segments.reduce(0) {
            $0 + Int64($1.action == .copy ? $1.range.count : 0)
        }
        if length > 0 { try await rate?.pass(length) }
        // Data that could not be shared may be cut at other places.
        let usual = chunk.isCompressed ? longestCompressed ?? pass.chunkSize : pass.chunkSize
        let count = max(Int(usual), chunk.dataSize(reading.target.traits.granularity))
        var data = try dataPool.take(byteCount: count)
        var encoded = try encodedPool.take(byteCount: reading.target.compresses ? count : 0)
        let pieces = try await reading.prepare(chunk, data: &data, encoded: &encoded)
        pass.noteRead(bytes: chunk.length)
        for digest in digests { try await digest.add(chunk, data: data.bytes) }
        let placement = try await writing.place(pieces, of: chunk, encoded: encoded.bytes)
        // Placing has copied the compressed clusters, so other chunks can use the memory while this
        // one waits for its write.
        encodedPool.giveBack(encoded)
        if placement.usesData {
            var bytes = data.mutableBytes
            try reading.target.seal(placement, data: &bytes)
            try await writing.write(placement, of: chunk, data: data.bytes)
            dataPool.giveBack(data)
        } else {
            dataPool.giveBack(data)
            try await writing.write(placement, of: chunk, data: RawSpan())
        }
        return []
    }
}
