import Concurrency
import DiskImage
import ImageFormats
import ImageStorage
import Synchronization

/// A disk that takes requests of one length. Calls come from many tasks at once.
protocol BenchedDisk: Sendable {
    /// Size in bytes.
    var size: Int64 { get }

    /// - Parameter offset: guest offset in bytes; the request lies within the disk.
    func send(at offset: Int64) async throws

    /// Brings all that was written before to stable storage.
    func flush() async throws
}

/// Reads from a disk in any format.
struct DiskReader: BenchedDisk {
    private let source: any ImageSource
    private let length: Int
    private let buffers = IOBufferPool()

    /// - Parameter length: of each request, in bytes.
    init(_ source: any ImageSource, length: Int) {
        self.source = source
        self.length = length
    }

    var size: Int64 { source.virtualSize }

    func send(at offset: Int64) async throws {
        var buffer = try buffers.take(byteCount: length)
        var bytes = buffer.mutableBytes
        var part = bytes.slice(0..<length)
        try await source.read(into: &part, at: offset)
        buffers.giveBack(buffer)
    }

    func flush() {}
}

/// A disk that is being written.
protocol BenchedTarget: BenchedDisk {
    /// Completes the image.
    func finish() async throws
}

/// Writes into a raw image.
final class StorageWriter: BenchedTarget {
    private let storage: any WritableStorage
    private let bytes: PatternBytes

    /// - Parameter length: of each request, in bytes.
    init(_ storage: any WritableStorage, length: Int, _ pattern: UInt8) throws(ImageError) {
        self.storage = storage
        bytes = try PatternBytes(length, pattern)
    }

    var size: Int64 { storage.size }

    func send(at offset: Int64) async throws {
        let bytes = bytes
        try await storage.write(bytes.span, at: offset)
    }

    func flush() async throws { try await storage.flush() }
    func finish() {}
}

/// Writes into an image of clusters, which are placed whole: the first request that covers a part
/// of a cluster reads the rest, and later ones write their part at the same place.
final class ClusterWriter: BenchedTarget {
    private let target: any ImageTarget
    private let storage: any WritableStorage
    private let before: any ImageSource
    private let bytes: PatternBytes
    private let length: Int64
    private let cluster: Int64
    private let buffers = IOBufferPool()
    private let gate = SerialGate()
    /// Indices of the clusters that have been placed.
    private let placed = Mutex(Set<Int64>())

    /// - Parameters:
    ///   - before: the disk as it was.
    ///   - length: of each request, in bytes.
    init(
        _ target: any ImageTarget, on storage: any WritableStorage, before: any ImageSource,
        length: Int, _ pattern: UInt8
    ) throws(ImageError) {
        self.target = target
        self.storage = storage
        self.before = before
        cluster = target.traits.granularity
        // A request that begins within a cluster can need one more.
        bytes = try PatternBytes(length + Int(cluster), pattern)
        self.length = Int64(length)
    }

    var size: Int64 { before.virtualSize }

    func send(at offset: Int64) async throws {
        let end = offset + length
        let whole =
            offset.roundedUp(
                to: cluster)..<max(
                offset.roundedUp(to: cluster), end.roundedDown(to: cluster))
        if whole.isEmpty, offset / cluster == (end - 1) / cluster {
            return try await writePart(offset..<end)
        }
        if offset < whole.lowerBound { try await writePart(offset..<whole.lowerBound) }
        if !whole.isEmpty {
            let placement = try await placeInTurn(whole)
            let bytes = bytes
            try await write(placement, bytes.span)
        }
        if whole.upperBound < end { try await writePart(whole.upperBound..<end) }
    }

    /// Writes a part of one cluster.
    private func writePart(_ range: Range<Int64>) async throws {
        let start = range.lowerBound.roundedDown(to: cluster)
        await gate.enter()
        guard !placed.withLock({ $0.contains(start / cluster) }) else {
            gate.leave()
            var placement = try await placeInTurn(start..<start + cluster)
            placement.clip(
                to: Int(range.lowerBound - start)..<Int(range.upperBound - start))
            let bytes = bytes
            return try await write(placement, bytes.span)
        }
        defer { gate.leave() }
        var buffer = try buffers.take(byteCount: Int(cluster))
        try await fill(&buffer, from: start, with: range)
        try await write(place(start..<start + cluster), buffer.bytes)
        buffers.giveBack(buffer)
    }

    /// Fills a buffer with a cluster as it is to be.
    private func fill(
        _ buffer: inout IOBuffer, from start: Int64, with range: Range<Int64>
    ) async throws {
        let count = Int(min(cluster, size - start))
        var all = buffer.mutableBytes
        all.zeroFill(count..<Int(cluster))
        var old = all.slice(0..<count)
        try await before.read(into: &old, at: start)
        let bytes = bytes
        var part = all.slice(Int(range.lowerBound - start)..<Int(range.upperBound - start))
        part.withUnsafeMutableBytes { room in
            bytes.span.extracting(0..<room.count).withUnsafeBytes { room.copyMemory(from: $0) }
        }
    }

    private func placeInTurn(_ range: Range<Int64>) async throws -> Placement {
        await gate.enter()
        defer { gate.leave() }
        return try await place(range)
    }

    /// Finds the place of whole clusters, whose bytes are the first ones of a buffer.
    private func place(_ range: Range<Int64>) async throws -> Placement {
        let placement = try await target.place(
            [EncodedPiece(guestRange: range, form: .plain(0..<range.count))], encoded: RawSpan())
        placed.withLock {
            $0.formUnion(range.lowerBound / cluster..<range.upperBound / cluster)
        }
        return placement
    }

    private func write(_ placement: Placement, _ data: RawSpan) async throws {
        try await target.write(
            placement, data: data, origin: BufferOrigin(layers: [], mappings: [], start: 0))
    }

    func flush() async throws {
        try await target.settle()
        try await storage.flush()
    }

    func finish() async throws { try await target.finish(virtualSize: size) }
}

extension Placement {
    /// Leaves only what comes from these positions of the data buffer.
    fileprivate mutating func clip(to wanted: Range<Int>) {
        writes = writes.compactMap { write in
            guard case .plain(let positions) = write.bytes else { return write }
            let part = positions.clamped(to: wanted)
            guard !part.isEmpty else { return nil }
            var clipped = write
            clipped.hostOffset += Int64(part.lowerBound - positions.lowerBound)
            clipped.bytes = .plain(part)
            return clipped
        }
    }
}

/// Memory that holds one byte many times.
private final class PatternBytes: @unchecked Sendable {
    // Written before others see the object.
    private var buffer: IOBuffer
    private let count: Int

    init(_ count: Int, _ byte: UInt8) throws(ImageError) {
        var buffer = try IOBuffer(byteCount: count)
        var bytes = buffer.mutableBytes
        bytes.withUnsafeMutableBytes { _ = $0.initializeMemory(as: UInt8.self, repeating: byte) }
        self.buffer = buffer
        self.count = count
    }

    var span: RawSpan {
        @_lifetime(borrow self)
        get {
            let span = buffer.bytes.extracting(0..<count)
            return _overrideLifetime(span, borrowing: self)
        }
    }
}
