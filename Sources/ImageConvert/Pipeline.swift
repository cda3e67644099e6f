import Concurrency
import DiskImage
import ImageStorage
import Synchronization

/// The engine: copies a guest disk from a source to a target in three stages.
///
///     ExtentIterator ──chunk──▶ ReadStage ──pieces──▶ WriteStage
///     one, walks the source     several at once,      places in guest order,
///     and cuts it into chunks   each with a buffer    writes in order or not
///
/// What a raw target can share with the source passes through `ShareStage` instead of the last two.
///
/// A worker takes a chunk through all three stages before it takes the next. How many do that at
/// once, and how long the chunks are, is the `Window`'s to say: that bounds the memory.
public struct Pipeline: Sendable {
    /// Large enough that a page cache is filled in large folios, small enough that a chunk is still
    /// in the core's cache when it is scanned and written, in bytes.
    public static let defaultChunk: Int64 = 448 << 10
    /// Compressing takes so long that larger chunks would only cost memory, in bytes.
    public static let chunkToCompress: Int64 = 64 << 10
    /// The limit for all buffers unless another one is given, in bytes.
    public static let defaultMemory: Int64 = 64 << 20

    /// The number of chunks on their way where copying is the work.
    public var workers: Int
    /// The number of chunks on their way where the storage waits; nil for as many as fit into
    /// `memory`.
    public var mostWorkers: Int?
    /// The limit for all buffers together, in bytes.
    public var memory: Int64 = Self.defaultMemory
    /// The meters of the storages that are read and written: they decide about the window.
    public var readMeters: [CallMeter] = []
    public var writeMeter: CallMeter?
    /// How much a worker takes at a time, at least, where the target does not compress, in bytes.
    public var smallestChunk = Self.defaultChunk
    /// A worker starts only if there can be as many for each: a small image is done sooner than a
    /// thread has begun and a buffer got its pages. 1 where waiting is what takes the time.
    public var chunksPerWorker: Int64 = 4
    /// What a chunk brings to be written waits for those before it; false is `-W`.
    public var writesInOrder: Bool
    /// Zeros are stored like data (`-S 0`).
    public var storesZeros: Bool
    /// Hashes what passes by.
    public var digest: DigestStage?
    /// Told how many bytes of the guest disk are done, now and then, from any task. The last of
    /// them may still be on their way.
    public var onProgress: (@Sendable (_ done: Int64) -> Void)?

    public init(
        workers: Int = 8, writesInOrder: Bool = true, storesZeros: Bool = false,
        onProgress: (@Sendable (_ done: Int64) -> Void)? = nil
    ) {
        self.workers = workers
        self.writesInOrder = writesInOrder
        self.storesZeros = storesZeros
        self.onProgress = onProgress
    }

    /// Copies all of the source; the target is whole when this returns.
    ///
    /// - Parameter extents: whose mappings decide what is copied. For a target with a backing file
    ///   that is the source's top layer alone, otherwise the source itself.
    /// - Throws: the first error of any stage, or `CancellationError`; the target is worthless
    ///   then.
    public func copy(
        from source: any ImageSource, extents: any ImageSource, to target: any ImageTarget
    ) async throws {
        let granularity = target.traits.granularity
        let smallest = max(Self.chunkToCompress, granularity, source.readGranularity)
        // Whole clusters, whatever a server likes.
        let chunkSize =
            target.compresses ? smallest : smallestChunk.roundedUp(to: smallest)
        // From files without holes zeros were never left out: there they are looked for.
        let sharesUnread =
            digest == nil && target.sharesUnread ? try await source.isSparse() : false
        // A target that compresses needs a second buffer for each chunk.
        let bounds = Window.Bounds(
            base: workers, limit: mostWorkers, memory: target.compresses ? memory / 2 : memory,
            unit: smallest, shortChunk: chunkSize)
        let iterator = ExtentIterator(
            source: extents,
            policy: CopyPolicy(target: target.traits, storesZeros: storesZeros),
            granularity: granularity, chunkSize: chunkSize,
            gridStart: smallest % chunkSize,
            sharesUnread: { sharesUnread && target.sharesUnread })
        let stages = Stages(
            reading: ReadStage(source: source, extents: extents, target: target),
            sharing: ShareStage(extents: extents, target: target),
            writing: WriteStage(
                extents: extents, target: target, isOrdered: writesInOrder,
                overlaps: { [writeMeter] in writeMeter?.isWaiting ?? false }),
            digest: digest)
        let window = WindowGate(bounds, meters: readMeters + (writeMeter.map { [$0] } ?? []))
        let progress = ProgressMark(onProgress)

        try await IOExecutor.run {
            try await withThrowingTaskGroup(of: Void.self) { group in
                let worthwhile = source.virtualSize / (chunkSize * chunksPerWorker) + 1
                for _ in 0..<min(Int64(bounds.most), worthwhile) {
                    group.addTask {
                        while true {
                            var pass = await window.enter()
                            guard let chunk = try await iterator.next(upTo: pass.chunkSize)
                            else { break }
                            if chunk.isCompressed { pass.noteCompressed() }
                            do {
                                let rest = try await stages.carry(chunk, with: &pass)
                                if chunk.isShared { await iterator.takeBack(rest) }
                            } catch {
                                if chunk.isShared { await iterator.takeBack([]) }
                                throw error
                            }
                            // All of it is done only when it is also written.
                            progress.reach(min(chunk.end, source.virtualSize - 1))
                        }
                    }
                }
                // The first error leaves the group, which cancels and awaits the other workers;
                // `waitForAll` would wait for them without cancelling.
                for try await _ in group {}
            }
            try Task.checkCancellation()
            try await digest?.finish(at: source.virtualSize)
            try await target.finish()
        }
        progress.reach(source.virtualSize)
    }
}

/// What a chunk passes through.
private struct Stages: Sendable {
    let reading: ReadStage
    let sharing: ShareStage
    let writing: WriteStage
    let digest: DigestStage?
    /// For a chunk as the guest sees it, and for its compressed clusters.
    private let dataPool = IOBufferPool()
    private let encodedPool = IOBufferPool()

    init(reading: ReadStage, sharing: ShareStage, writing: WriteStage, digest: DigestStage?) {
        self.reading = reading
        self.sharing = sharing
        self.writing = writing
        self.digest = digest
    }

    /// - Returns: what could not be shared and has to be copied, if the chunk was to be.
    func carry(
        _ chunk: Chunk, with pass: inout WindowPass
    ) async throws -> [Mapping] {
        guard !chunk.isShared else { return try await share(chunk) }
        // Ranges that sharing left over may be cut in another way.
        let count = max(Int(pass.chunkSize), chunk.dataSize(reading.target.traits.granularity))
        var data = try dataPool.take(byteCount: count)
        var encoded = try encodedPool.take(byteCount: reading.target.compresses ? count : 0)
        let pieces = try await reading.prepare(chunk, data: &data, encoded: &encoded)
        pass.noteRead(bytes: chunk.length)
        try await digest?.add(chunk, data: data.bytes)
        let placement = try await writing.place(pieces, of: chunk, encoded: encoded.bytes)
        // Placing has copied what is compressed: others can use the memory while this chunk waits
        // for its write.
        encodedPool.giveBack(encoded)
        if placement.usesData {
            try await writing.write(placement, of: chunk, data: data.bytes)
            dataPool.giveBack(data)
        } else {
            dataPool.giveBack(data)
            try await writing.write(placement, of: chunk, data: RawSpan())
        }
        return []
    }

    /// In the chunk's turn.
    private func share(_ chunk: Chunk) async throws -> [Mapping] {
        try await writing.enterTurn(of: chunk)
        let rest = sharing.share(chunk)
        writing.leaveTurn(of: chunk)
        return rest
    }
}

/// How far the workers have come, all together: never backwards.
private final class ProgressMark: Sendable {
    private let done = Mutex<Int64>(0)
    private let report: (@Sendable (Int64) -> Void)?

    init(_ report: (@Sendable (Int64) -> Void)?) { self.report = report }

    func reach(_ offset: Int64) {
        guard let report else { return }
        // Under the lock: a report must not overtake a later one.
        done.withLock {
            guard offset > $0 else { return }
            $0 = offset
            report(offset)
        }
    }
}
