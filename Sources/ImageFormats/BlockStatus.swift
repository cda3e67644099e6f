import DiskImage
import ImageStorage

/// What metadata says about a range of guest disk, in the terms in which qemu puts it: callers compare our
/// answers with qemu-img's.
public struct BlockStatus: OptionSet, Sendable {
    public let rawValue: UInt8

    public init(rawValue: UInt8) { self.rawValue = rawValue }

    /// It has to be read to be known.
    public static let data = BlockStatus(rawValue: 1)
    /// It reads as zeros.
    public static let zero = BlockStatus(rawValue: 2)
    /// Some image of the chain decides what it is, and not the lack of any.
    public static let allocated = BlockStatus(rawValue: 4)
    /// It lies somewhere as it is: not compressed, not made up.
    public static let hasOffset = BlockStatus(rawValue: 8)
    /// The image allocates ahead of its data, so the file system was asked, too.
    public static let preallocated = BlockStatus(rawValue: 16)
    /// A part of it lies in clusters wholly behind the end of the file: zeros to qemu, and an error
    /// when it is read.
    public static let missing = BlockStatus(rawValue: 32)
}

/// Finds out the block status of an image and all that lies below it.
public struct BlockStatusReader: Sendable {
    private struct Layer {
        var source: any ImageSource
        /// Holes of the file under allocated clusters count as zeros.
        var looksForHoles: Bool
    }

    private let layers: [Layer]

    public init(_ image: OpenedImage) async throws {
        var layers: [Layer] = []
        for layer in image.layers {
            layers.append(
                Layer(
                    source: layer.source,
                    looksForHoles: try await Self.looksPreallocated(layer)))
        }
        self.layers = layers
    }

    private static func looksPreallocated(_ layer: OpenedLayer) async throws -> Bool {
        guard let image = layer.qcow2 else { return false }
        do {
            return try await Qcow2Preallocation.isLikely(image)
        } catch is ImageError {
            // Refcounts that cannot be read are no reason not to read the disk.
            return false
        }
    }

    /// Of the guest disk, in bytes.
    public var virtualSize: Int64 { layers[0].source.virtualSize }

    /// What the disk holds from `offset` on.
    ///
    /// - Parameter limit: how far to look, in bytes; `0 <= offset < limit <= virtualSize`.
    /// - Returns: a range that starts at `offset`; the next one may have the same status.
    /// - Throws: `ImageError` for damaged tables, and where they cannot be read.
    public func status(
        at offset: Int64, limit: Int64
    ) async throws -> (range: Range<Int64>, status: BlockStatus) {
        var limit = limit
        for layer in layers {
            // A backing file that is too short decides for zeros.
            guard offset < layer.source.virtualSize else {
                return (offset..<limit, [.zero, .allocated])
            }
            let found = try await Self.status(
                of: layer, at: offset, limit: min(limit, layer.source.virtualSize))
            if found.status.contains(.allocated) { return found }
            limit = found.range.upperBound
        }
        return (offset..<limit, .zero)
    }

    /// - Returns: without `.allocated` where the layer leaves the answer to the one below.
    private static func status(
        of layer: Layer, at offset: Int64, limit: Int64
    ) async throws -> (range: Range<Int64>, status: BlockStatus) {
        if let source = layer.source as? Qcow2Source {
            return try await source.status(
                at: offset, limit: limit, looksForHoles: layer.looksForHoles)
        }
        let extent = try await layer.source.extent(at: offset, limit: limit)
        let kind: BlockStatus = extent.content == .zero ? .zero : .data
        return (extent.range, [kind, .allocated, .hasOffset])
    }
}

extension Qcow2Source {
    fileprivate func status(
        at offset: Int64, limit: Int64, looksForHoles: Bool
    ) async throws -> (range: Range<Int64>, status: BlockStatus) {
        let run = try await tables.run(at: offset, limit: limit)
        switch run.mapping {
        case .unallocated: return (run.range, [])
        case .zero: return (run.range, [.zero, .allocated])
        case .compressed: return (run.range, [.data, .allocated])
        case .standard(let host):
            let status: BlockStatus = [.data, .allocated, .hasOffset]
            guard looksForHoles else { return (run.range, status) }
            return try await preallocatedStatus(run.range, host, status.union(.preallocated))
        }
    }

    private func preallocatedStatus(
        _ range: Range<Int64>, _ host: HostOffset, _ status: BlockStatus
    ) async throws -> (range: Range<Int64>, status: BlockStatus) {
        let size = storage.size
        let isCut =
            host.bytes + Int64(range.count) > size
            && host.bytes + Int64(range.count) > size.roundedUp(to: readGranularity)
        let zero: BlockStatus = isCut ? [.zero, .missing] : .zero
        guard host.bytes < size else { return (range, status.union(zero)) }
        let below = try await storage.extent(
            at: host.bytes, limit: min(host.bytes + Int64(range.count), storage.size))
        guard below.content == .zero else {
            return (range.lowerBound..<range.lowerBound + Int64(below.range.count), status)
        }
        // A hole at the end of the file goes on behind it.
        if below.range.upperBound == size { return (range, status.union(zero)) }
        return (
            range.lowerBound..<range.lowerBound + Int64(below.range.count), status.union(.zero)
        )
    }
}
