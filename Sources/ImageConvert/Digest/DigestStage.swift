import Concurrency
import DiskImage
import ImageFormats
import Synchronization

/// A stage beside the others: the digest of the guest disk as it passes by.
///
/// The blocks of a block hash are hashed by all workers beside each other, and only the hashes wait
/// for their turn. A SHA-256 has to see one byte after the other: there workers wait for their
/// turn, each with one chunk. Memory stays bounded by them.
public final class DigestStage: Sendable {
    private enum Sum {
        case sha256(Shared<SHA256>)
        case blkhash(Shared<BlockHash>)
    }

    /// For one task at a time, of those that share it.
    private final class Shared<Hash: ~Copyable & Sendable>: Sendable {
        let hash: Mutex<Hash>
        init(_ hash: consuming Hash) { self.hash = Mutex(hash) }
    }

    /// The largest part of a disk whose hashes are kept until their turn, in bytes.
    private static let largestPart: Int64 = 128 << 20

    private let sum: Sum
    private let hashers = ResourcePool { () throws(ImageError) in Shared(try BlockHasher()) }
    /// How far the disk has been hashed, in bytes.
    private let position = Mutex<Int64>(0)
    private let gate = TurnGate()
    private let skipped: (any ImageSource)?
    private let zerosBehind: Int64
    private let check: @Sendable (DiskDigest) throws -> Void

    /// - Parameters:
    ///   - skipped: what skipped ranges hold; nil if they are all zeros.
    ///   - zerosBehind: how many zeros the guest disk has behind what is copied, in bytes.
    ///   - check: told the digest before the target becomes whole; it can refuse it.
    /// - Throws: `ImageError` where there is no library for it.
    public init(
        _ algorithm: DigestAlgorithm, skipped: (any ImageSource)? = nil, zerosBehind: Int64 = 0,
        check: @escaping @Sendable (DiskDigest) throws -> Void
    ) throws(ImageError) {
        sum =
            switch algorithm {
            case .sha256: .sha256(Shared(try SHA256()))
            case .blkhash: .blkhash(Shared(try BlockHash.make()))
            }
        self.skipped = skipped
        self.zerosBehind = zerosBehind
        self.check = check
    }

    /// Hashes a chunk and what was skipped before it.
    ///
    /// - Parameter data: the chunk's buffer.
    func add(_ chunk: Chunk, data: RawSpan) async throws {
        switch sum {
        case .sha256(let sum):
            try await gate.enter(chunk.sequence)
            try await feed(chunk, data, to: sum.hash)
        case .blkhash(let sum) where isWholeBlocks(chunk):
            let hasher = try hashers.take()
            try await feed(chunk, data, to: hasher.hash)
            let hashes = hasher.hash.withLock { $0.takeHashes() }
            hashers.giveBack(hasher)
            try await gate.enter(chunk.sequence)
            try sum.hash.withLock { try $0.append(hashes) }
        case .blkhash(let sum):
            try await gate.enter(chunk.sequence)
            try await feed(chunk, data, to: sum.hash)
        }
        position.withLock { $0 = chunk.end }
        gate.leave()
    }

    /// Whether a chunk can be hashed by itself. (Zeros have no hashes of their own, however long
    /// they are.)
    private func isWholeBlocks(_ chunk: Chunk) -> Bool {
        chunk.begin % BlockHasher.blockSize == 0 && chunk.end % BlockHasher.blockSize == 0
            && (skipped == nil || chunk.end - chunk.begin <= Self.largestPart)
    }

    /// Hashes the rest of the disk and hands out the digest.
    ///
    /// - Parameter size: of what was copied, in bytes.
    func finish(at size: Int64) async throws {
        let rest = position.withLock { $0 }..<size
        switch sum {
        case .sha256(let sum):
            try await feedEnd(rest, to: sum.hash)
            try check(DiskDigest(.sha256, try sum.hash.withLock { try $0.finish() }))
        case .blkhash(let sum):
            try await feedEnd(rest, to: sum.hash)
            try check(DiskDigest(.blkhash, try sum.hash.withLock { try $0.finish() }))
        }
    }

    // MARK: In guest order

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
        // A long run may take long: it must be possible to end it.
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
        var position = range.lowerBound
        while position < range.upperBound {
            let extent = try await skipped.extent(at: position, limit: range.upperBound)
            if extent.content == .zero || extent.content == .backing {
                try feedZeros(Int64(extent.range.count), to: hash)
            } else {
                try await feedRead(extent.range, of: skipped, to: hash)
            }
            position = extent.range.upperBound
        }
    }

    private func feedRead<Hash: ByteSink & ~Copyable>(
        _ range: Range<Int64>, of source: any ImageSource, to hash: borrowing Mutex<Hash>
    ) async throws {
        // A compressed cluster in two pieces would be decompressed twice.
        let size = Pipeline.defaultChunk.roundedUp(to: source.readGranularity)
        var buffer = try IOBuffer(byteCount: Int(min(size, Int64(range.count))))
        var position = range.lowerBound
        while position < range.upperBound {
            let end = min(position + Int64(buffer.byteCount), range.upperBound)
            let count = Int(end - position)
            var all = buffer.mutableBytes
            var part = all.slice(0..<count)
            try await source.read(into: &part, at: position)
            let bytes = buffer.bytes.extracting(0..<count)
            try hash.withLock { try $0.add(bytes) }
            position = end
        }
    }
}
