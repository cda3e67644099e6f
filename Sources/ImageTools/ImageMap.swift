import DiskImage
import ImageDrivers
import ImageFormats

/// A range of a guest disk with the source and the host offset of its bytes.
public struct MapEntry: Sendable, Equatable {
    /// Guest offsets in bytes.
    public var range: Range<Int64>
    /// Index of the image in the chain that determines this range; 0 is the image itself.
    public var depth: Int
    public var content: StoredRun.Content
    /// Offset in that image's file, in bytes; nil if the range has none.
    public var hostOffset: Int64?

    public var isPresent: Bool { content != .unallocated }
    public var isZero: Bool { content != .data && content != .compressed }
    public var isData: Bool {
        content == .data || content == .preallocated || content == .compressed
    }

    /// Whether both entries have the same properties and are adjacent on the disk and in the file.
    func isContinued(by next: MapEntry) -> Bool {
        guard depth == next.depth, isPresent == next.isPresent, isZero == next.isZero,
            isData == next.isData
        else { return false }
        switch (hostOffset, next.hostOffset) {
        case (nil, nil): return true
        case (let host?, let nextHost?): return host + Int64(range.count) == nextHost
        default: return false
        }
    }
}

/// Walks over a guest disk through the whole chain of images and reports each range.
///
/// Memory holds one entry at a time, whatever the size of the image.
public struct ImageMap: Sendable {
    public let layers: [OpenedLayer]

    /// - Parameter layers: the chain, beginning with the image itself; not empty.
    public init(_ layers: [OpenedLayer]) {
        precondition(!layers.isEmpty)
        self.layers = layers
    }

    /// File names of the images in qemu's form, by depth.
    public var fileNames: [String] {
        layers.map { Storages.driver(for: $0.name).shownName($0.name) }
    }

    /// Size of the guest disk in bytes.
    public var guestSize: Int64 { layers[0].image.guestSize }

    /// Calls `body` for each range of the disk, front to back without gaps, each as long as
    /// possible.
    ///
    /// - Parameter range: guest offsets in bytes; clipped to the end of the disk.
    /// - Throws: `ImageError` for damaged tables, what `body` throws, `CancellationError`.
    public func forEachEntry(
        in range: Range<Int64>, _ body: (MapEntry) throws -> Void
    ) async throws {
        let chain = Chain(layers)
        let end = min(range.upperBound, guestSize)
        var position = range.lowerBound
        var current: MapEntry?
        var count = 0
        while position < end {
            count += 1
            // Runs come by the million, and each check for cancellation costs time.
            if count % 4096 == 0 { try Task.checkCancellation() }
            let next: MapEntry
            switch try chain.entry(at: position, limit: end) {
            case .found(let entry): next = entry
            case .missing(let depth, let limit):
                try Task.checkCancellation()
                try await chain.images[depth].runs.load(at: position, limit: limit)
                continue
            }
            position = next.range.upperBound
            if let known = current, known.isContinued(by: next) {
                current?.range = known.range.lowerBound..<position
            } else {
                if let known = current { try body(known) }
                current = next
            }
        }
        if let current { try body(current) }
    }

    /// The images of one walk with their run readers.
    private final class Chain {
        enum Answer {
            case found(MapEntry)
            /// The image at this depth has to load metadata first.
            case missing(depth: Int, limit: Int64)
        }

        let images: [(size: Int64, runs: any StoredRunReader)]

        init(_ layers: [OpenedLayer]) {
            images = layers.map { ($0.image.guestSize, $0.image.storedRuns()) }
        }

        func entry(at offset: Int64, limit: Int64) throws -> Answer {
            var limit = limit
            var depth = 0
            while true {
                limit = min(limit, images[depth].size)
                guard let run = try images[depth].runs.run(at: offset, limit: limit) else {
                    return .missing(depth: depth, limit: limit)
                }
                let isLast = depth + 1 == images.count
                // A backing file may be shorter than its overlay; zeros follow its end.
                if run.content != .unallocated || isLast || offset >= images[depth + 1].size {
                    return .found(
                        MapEntry(
                            range: run.range, depth: depth, content: run.content,
                            hostOffset: run.hostOffset))
                }
                limit = run.range.upperBound
                depth += 1
            }
        }
    }
}
