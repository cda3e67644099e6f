import DiskImage
import ImageStorage

/// The answer of metadata about a range of guest disk, in qemu's terms: callers
/// compare our answers with qemu-img's.
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
        var image: any Image
        /// Holes of the file under allocated clusters count as zeros.
        var looksForHoles: Bool
    }

    private let layers: [Layer]

    /// - Parameter images: from the image itself down; never empty.
    public init(_ images: [any Image]) async throws {
        var layers: [Layer] = []
        for image in images {
            layers.append(Layer(image: image, looksForHoles: try await image.isPreallocated()))
        }
        self.layers = layers
    }

    /// Of the guest disk, in bytes.
    public var virtualSize: Int64 { layers[0].image.virtualSize }

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
            guard offset < layer.image.virtualSize else {
                return (offset..<limit, [.zero, .allocated])
            }
            let found = try await layer.image.blockStatus(
                at: offset, limit: min(limit, layer.image.virtualSize),
                looksForHoles: layer.looksForHoles)
            if found.status.contains(.allocated) { return found }
            limit = found.range.upperBound
        }
        return (offset..<limit, .zero)
    }
}

extension Image {
    public func isPreallocated() async throws -> Bool { false }

    public func blockStatus(
        at offset: Int64, limit: Int64, looksForHoles: Bool
    ) async throws -> (range: Range<Int64>, status: BlockStatus) {
        let extent = try await extent(at: offset, limit: limit)
        let status: BlockStatus =
            switch extent.content {
            case .data: [.data, .allocated, .hasOffset]
            case .compressed: [.data, .allocated]
            case .zero: [.zero, .allocated, .hasOffset]
            case .backing: []
            }
        return (extent.range, status)
    }
}
