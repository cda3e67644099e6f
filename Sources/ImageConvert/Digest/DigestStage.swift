import Concurrency
import DiskImage
import ImageFormats
import Synchronization

/// An extra pipeline stage that computes the digest of the guest disk during the copy.
///
/// For a block hash, the workers hash blocks in parallel, and only adding the hashes happens in
/// guest order. SHA-256 must see the bytes in order, so workers wait for their turn, each holding
/// one chunk; the number of workers thus bounds the memory.
public final class DigestStage: Sendable {
    private enum Sum {
        case plain(Shared<SHA256>)
        case blocks(Shared<BlockHash>)
    }

    /// A hash whose lock lets several tasks share it.
    private final class Shared<Hash: ~Copyable & Sendable>: Sendable {
        let hash: Mutex<Hash>
        init(_ hash: consuming Hash) { self.hash = Mutex(hash) }
    }

    /// The largest chunk, in bytes, whose block hashes may wait in memory for their turn.
    private static let largestPart: Int64 = 128 << 20

    /// Length in bytes of the blocks that are hashed on their own; 1 if there are none.
    let blockSize: Int64
    private let sum: Sum
    private let hashers: ResourcePool<Shared<BlockHasher>>
    /// End of the hashed part of the disk, in bytes.
    private let position = Mutex<Int64>(0)
    private let gate = TurnGate()
    private let skipped: (any ImageSource)?
    private let zerosBehind: Int64
    /// Called with the bytes of the hash.
    private let check: @Sendable ([UInt8]) throws -> Void

    /// - Parameters:
    ///   - skipped: the content of skipped ranges; nil if they are all zeros.
    ///   - zerosBehind: number of zero bytes that the guest disk has after the copied part.
    ///   - check: called with the digest before the target is committed; may throw to refuse it.
    /// - Throws: `ImageError` if libcrypto is missing or fails.
    public convenience init(
        _ algorithm: DigestAlgorithm, skipped: (any ImageSource)? = nil, zerosBehind: Int64 = 0,
        check: @escaping @Sendable (DiskDigest) throws -> Void
    ) throws(ImageError) {
        try self.init(
            form: algorithm == .blkhash ? .blkhash : nil, skipped: skipped,
            zerosBehind: zerosBehind, check: { try check(DiskDigest(algorithm, $0)) })
    }

    /// - Parameter form: of a block hash; nil hashes the bytes of the disk.
    init(
        form: BlockHashForm?, skipped: (any ImageSource)? = nil, zerosBehind: Int64 = 0,
        check: @escaping @Sendable ([UInt8]) throws -> Void
    ) throws(ImageError) {
        if let form {
            sum = .blocks(Shared(try BlockHash.make(form)))
        } else {
            sum = .plain(Shared(try SHA256()))
        }
        blockSize = form?.blockSize ?? 1
        hashers = ResourcePool { () throws(ImageError) in
            Shared(try BlockHasher(form ?? .blkhash))
        }
        self.skipped = skipped
        self.zerosBehind = zerosBehind
        self.check = check
    }

    /// Hashes a chunk and the skipped range before it.
    ///
    /// - Parameter data: the chunk's buffer.
    func add(_ chunk: Chunk, data: RawSpan) async throws {
        switch sum {
        case .plain(let sum):
            try await gate.enter(chunk.sequence)
            try await feed(chunk, data, to: sum.hash)
        case .blocks(let sum) where isWholeBlocks(chunk):
            let hasher = try hashers.take()
            try await feed(chunk, data, to: hasher.hash)
            let hashes = hasher.hash.withLock { $0.takeHashes() }
            hashers.giveBack(hasher)
            try await gate.enter(chunk.sequence)
            try sum.hash.withLock { try $0.append(hashes) }
        case .blocks(let sum):
            try await gate.enter(chunk.sequence)
            try await feed(chunk, data, to: sum.hash)
        }
        position.withLock { $0 = chunk.end }
        gate.leave()
    }

    /// Whether a chunk can be hashed on its own. Its length matters only if skipped ranges are
    /// read: runs of zeros take no memory.
    private func isWholeBlocks(_ chunk: Chunk) -> Bool {
        chunk.begin % blockSize == 0 && chunk.end % blockSize == 0
            && (skipped == nil || chunk.end - chunk.begin <= Self.largestPart)
    }

    /// Hashes the rest of the disk and passes the digest to `check`.
    ///
    /// - Parameter size: number of copied bytes.
    func finish(at size: Int64) async throws {
        let rest = position.withLock { $0 }..<size
        switch sum {
        case .plain(let sum):
            try await feedEnd(rest, to: sum.hash)
            try check(try sum.hash.withLock { try $0.finish() })
        case .blocks(let sum):
            try await feedEnd(rest, to: sum.hash)
            try check(try sum.hash.withLock { try $0.finish() })
        }
    }

    // MARK: Hashing in guest order

    private func feed<Hash: ByteSink & ~Copyable>(
        _ chunk: Chunk, _ data: RawSpan, to hash: borrowing Mutex<Hash>
    ) async throws {
        var position = chunk.begin
        for segment in chunk.segments {
            try await feedSkipped(position..<segment.range.lowerBound, to: hash)
            if segment.action == .copy {
                let start = Int(segment.range.lowerBound - chunk.start)
                let bytes = data.extracting(start..<start + segment.range.count)
                try hash.withLock { try $0.add(bytes) }
            } else {
                try feedZeros(Int64(segment.range.count), to: hash)
            }
            position = segment.range.upperBound
        }
        try await feedSkipped(position..<chunk.end, to: hash)
    }

    private func feedEnd<Hash: ByteSink & ~Copyable>(
        _ rest: Range<Int64>, to hash: borrowing Mutex<Hash>
    ) async throws {
        try await feedSkipped(rest, to: hash)
        try feedZeros(zerosBehind, to: hash)
    }

    private func feedZeros<Hash: ByteSink & ~Copyable>(
        _ count: Int64, to hash: borrowing Mutex<Hash>
    ) throws {
        // A long run takes long, so it must be cancellable.
        var rest = count
        while rest > 0 {
            try Task.checkCancellation()
            let part = min(rest, 64 << 20)
            try hash.withLock { try $0.addZeros(part) }
            rest -= part
        }
    }

    private func feedSkipped<Hash: ByteSink & ~Copyable>(
        _ range: Range<Int64>, to hash: borrowing Mutex<Hash>
    ) async throws {
        guard let skipped else { return try feedZeros(Int64(range.count), to: hash) }
        // Reading a compressed cluster in two pieces would decompress it twice.
        let size = Pipeline.defaultChunk.roundedUp(to: skipped.readGranularity)
        var buffer = try IOBuffer(byteCount: Int(min(size, Int64(range.count))))
        var walk = MappingWalk(skipped)
        var position = range.lowerBound
        while position < range.upperBound {
            let limit = min(range.upperBound, (position + 1).roundedUp(to: size))
            let run = try await Self.stored(&walk, from: position, limit: limit)
            guard let last = run.last else {
                let zeros = try await walk.mapping(at: position, limit: range.upperBound)
                try feedZeros(Int64(zeros.range.count), to: hash)
                position = zeros.range.upperBound
                continue
            }
            let count = Int(last.range.upperBound - position)
            var all = buffer.mutableBytes
            var part = all.slice(0..<count)
            try await skipped.read(run[...], into: &part)
            let bytes = buffer.bytes.extracting(0..<count)
            try hash.withLock { try $0.add(bytes) }
            position = last.range.upperBound
        }
    }

    /// The mappings to read from an offset on, up to the first zeros.
    private static func stored(
        _ walk: inout MappingWalk, from start: Int64, limit: Int64
    ) async throws -> [Mapping] {
        var run: [Mapping] = []
        var position = start
        while position < limit {
            let mapping = try await walk.mapping(at: position, limit: limit)
            guard mapping.needsReading else { break }
            run.append(mapping)
            position = mapping.range.upperBound
        }
        return run
    }
}
