import Concurrency
import DiskImage
import ImageStorage
import Synchronization

/// A stage beside the others: the SHA-256 of the guest disk as it passes by.
///
/// The number is that of the plain bytes, what `sha256sum` says of a raw image, so they have to be hashed one after
/// the other. Workers come with their chunks in guest order and wait for their turn, each with one chunk: memory
/// stays bounded by them, and while one hashes the others read. What is between the chunks was skipped.
public final class DigestStage: Sendable {
    private struct State: ~Copyable {
        var hash: SHA256
        /// How far the disk has been hashed, in bytes.
        var position: Int64 = 0
    }

    private let state: Mutex<State>
    private let gate = TurnGate()
    private let skipped: (any ImageSource)?
    private let zerosBehind: Int64
    private let check: @Sendable (String) throws -> Void

    /// - Parameters:
    ///   - skipped: what skipped ranges hold; nil if they are all zeros.
    ///   - zerosBehind: how many zeros the guest disk has behind what is copied, in bytes.
    ///   - check: told the digest, 64 lower-case digits, before the target becomes whole; it can refuse it.
    /// - Throws: `ImageError` where there is no library for it.
    public init(
        skipped: (any ImageSource)? = nil, zerosBehind: Int64 = 0,
        check: @escaping @Sendable (String) throws -> Void
    ) throws(ImageError) {
        state = Mutex(State(hash: try SHA256()))
        self.skipped = skipped
        self.zerosBehind = zerosBehind
        self.check = check
    }

    /// Hashes a chunk and what was skipped before it, in the chunk's turn.
    ///
    /// - Parameter data: the chunk's buffer.
    func add(_ chunk: Chunk, data: RawSpan) async throws {
        try await gate.enter(chunk.sequence)
        for segment in chunk.segments {
            try await addSkipped(upTo: segment.range.lowerBound)
            if segment.action == .copy {
                let start = Int(segment.range.lowerBound - chunk.start)
                try add(data.extracting(start..<start + segment.range.count))
            } else {
                try addZeros(Int64(segment.range.count))
            }
        }
        gate.leave()
    }

    /// Hashes the rest of the disk and hands out the digest.
    ///
    /// - Parameter size: of what was copied, in bytes.
    func finish(at size: Int64) async throws {
        try await addSkipped(upTo: size)
        try addZeros(zerosBehind)
        try check(try state.withLock { try $0.hash.finish() })
    }

    private func add(_ bytes: RawSpan) throws {
        try state.withLock {
            try $0.hash.update(bytes)
            $0.position += Int64(bytes.byteCount)
        }
    }

    private func addZeros(_ count: Int64) throws {
        // A long run takes long: it must be possible to end it.
        var rest = count
        while rest > 0 {
            let part = min(rest, 64 << 20)
            try state.withLock {
                try $0.hash.updateZeros(count: part)
                $0.position += part
            }
            rest -= part
            try Task.checkCancellation()
        }
    }

    private func addSkipped(upTo end: Int64) async throws {
        var position = state.withLock { $0.position }
        guard let skipped else { return try addZeros(end - position) }
        while position < end {
            let extent = try await skipped.extent(at: position, limit: end)
            if extent.content == .zero || extent.content == .backing {
                try addZeros(Int64(extent.range.count))
            } else {
                try await addRead(extent.range, of: skipped)
            }
            position = extent.range.upperBound
        }
    }

    private func addRead(_ range: Range<Int64>, of source: any ImageSource) async throws {
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
            try add(buffer.bytes.extracting(0..<count))
            position = end
        }
    }
}
