import DiskImage
import ImageStorage

/// An image whose clusters lie in its storage as they are, or nowhere: to say where is all it takes
/// to read it.
public protocol MappedImage: Image {
    /// The run of the image that begins at a guest offset.
    ///
    /// - Parameter limit: how far to look, in bytes; `0 <= offset < limit <= virtualSize`.
    /// - Returns: a run that starts at `offset` and ends at `limit` at the latest; never
    ///   compressed.
    /// - Throws: `ImageError` for damaged tables.
    func run(at offset: Int64, limit: Int64) async throws -> StoredRun
}

extension MappedImage {
    public func isSparse() async throws -> Bool { storage.traits.hasHoles }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        let first = try await run(at: offset, limit: limit)
        var end = first.range.upperBound
        while end < limit {
            let next = try await run(at: end, limit: limit)
            guard next.extentContent == first.extentContent else { break }
            end = next.range.upperBound
        }
        return Extent(range: offset..<end, content: first.extentContent)
    }

    public func location(at offset: Int64, limit: Int64) async throws -> HostLocation? {
        let run = try await run(at: offset, limit: limit)
        guard run.content == .data, let host = run.hostOffset, host < storage.size else {
            return nil
        }
        let end = min(host + Int64(run.range.count), storage.size)
        return HostLocation(holder: storage, range: host..<end)
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let end = offset + Int64(buffer.byteCount)
        var position = offset
        while position < end {
            let run = try await run(at: position, limit: end)
            let place = Int(position - offset)..<Int(run.range.upperBound - offset)
            let host = run.content == .data ? run.hostOffset : nil
            // A file can end within its last cluster: the rest reads as zeros.
            let stored = host.map { min(Int64(place.count), storage.size - $0) } ?? 0
            let middle = place.lowerBound + Int(max(0, stored))
            if let host, middle > place.lowerBound {
                var part = buffer.slice(place.lowerBound..<middle)
                try await storage.read(into: &part, at: host)
            }
            buffer.zeroFill(middle..<place.upperBound)
            position = run.range.upperBound
        }
    }

    public func storedRuns() -> any StoredRunReader { MappedRunReader(self) }
}

extension StoredRun {
    /// The content in the terms of a source.
    var extentContent: Extent.Content {
        switch content {
        case .unallocated: .backing
        case .zero, .hole, .preallocated: .zero
        case .data: .data
        case .compressed: .compressed
        }
    }
}

/// The runs of an image, each asked for when it is needed.
private final class MappedRunReader: StoredRunReader {
    private let image: any MappedImage
    private var last: StoredRun?

    init(_ image: any MappedImage) { self.image = image }

    func run(at offset: Int64, limit: Int64) -> StoredRun? {
        guard var run = last, run.range.contains(offset) else { return nil }
        run.hostOffset = run.hostOffset.map { $0 + offset - run.range.lowerBound }
        run.range = offset..<min(limit, run.range.upperBound)
        return run
    }

    func load(at offset: Int64, limit: Int64) async throws {
        last = try await image.run(at: offset, limit: limit)
    }
}
