import DiskImage
import ImageFormats

/// The answer of metadata about a range of guest disk in qemu's terms, because `compare -s`
/// compares the answers.
struct BlockStatus: OptionSet {
    let rawValue: UInt8

    /// The bytes have to be read to be known.
    static let data = BlockStatus(rawValue: 1)
    /// The range reads as zeros.
    static let zero = BlockStatus(rawValue: 2)
    /// An image of the chain determines the content, and not the lack of one.
    static let allocated = BlockStatus(rawValue: 4)
    /// The bytes have a place in a file, uncompressed.
    static let hasOffset = BlockStatus(rawValue: 8)
    /// The image allocates ahead of its data, so the file system was asked, too.
    static let preallocated = BlockStatus(rawValue: 16)
    /// A part of it lies in clusters wholly behind the end of the file: zeros to qemu, and an error
    /// when it is read.
    static let missing = BlockStatus(rawValue: 32)
}

/// Tells the block status of a guest disk, front to back.
struct BlockStatusReader: Sendable {
    private let virtualSize: Int64
    private let isPreallocated: [Bool]
    private var walk: MappingWalk

    /// - Parameter images: from the image itself down; never empty.
    init(_ images: [any Image]) async throws {
        let disk = LayeredSource(layers: images, sizeBelow: .max)
        virtualSize = disk.virtualSize
        walk = MappingWalk(disk, holes: .asQemu)
        var isPreallocated: [Bool] = []
        for image in images { isPreallocated.append(try await image.isPreallocated()) }
        self.isPreallocated = isPreallocated
    }

    /// The status from `offset` on, in whole sectors: a sector in which a disk of the chain ends
    /// has the status of its first part.
    ///
    /// - Parameters:
    ///   - offset: a multiple of the sector size.
    ///   - limit: end of the search in bytes, a multiple of the sector size.
    /// - Returns: the status and its end, another multiple.
    /// - Throws: `ImageError` for damaged tables, and where they cannot be read.
    mutating func status(
        at offset: Int64, limit: Int64
    ) async throws -> (end: Int64, status: BlockStatus) {
        let mapping = try await walk.mapping(at: offset, limit: min(limit, virtualSize))
        return (mapping.range.upperBound.roundedUp(to: guestSectorSize), status(of: mapping))
    }

    private func status(of mapping: Mapping) -> BlockStatus {
        switch mapping.content {
        case .data:
            isPreallocated[mapping.layer]
                ? [.data, .allocated, .hasOffset, .preallocated] : [.data, .allocated, .hasOffset]
        case .preallocated: [.data, .zero, .allocated, .hasOffset, .preallocated]
        case .missing: [.data, .zero, .allocated, .hasOffset, .preallocated, .missing]
        case .compressed, .encrypted: [.data, .allocated]
        case .marked: []
        case .zero: [.zero, .allocated]
        case .hole: [.zero, .allocated, .hasOffset]
        // A backing file that is too short decides for zeros.
        case .unallocated:
            mapping.layer + 1 < isPreallocated.count ? [.zero, .allocated] : .zero
        }
    }
}
