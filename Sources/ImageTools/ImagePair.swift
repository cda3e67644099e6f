import DiskImage
import ImageDrivers
import ImageFormats

/// Two guest disks side by side; the shorter one reads as zeros after its end.
struct ImagePair: Sendable {
    /// The work that a range needs.
    enum Step: Sendable, Equatable {
        /// Both disks are known to be zero.
        case nothing
        case readFirst
        case readSecond
        case readBoth
        /// Strict mode: metadata alone shows a difference.
        case statusDiffers
    }

    let first: any ImageSource
    let second: any ImageSource
    /// Sizes in bytes, rounded up to whole sectors.
    let firstSize: Int64
    let secondSize: Int64
    private let statuses: (BlockStatusReader, BlockStatusReader)?

    /// - Throws: `ImageError`.
    init(_ one: OpenedImage, _ other: OpenedImage, isStrict: Bool) async throws {
        firstSize = one.source.virtualSize.roundedUp(to: guestSectorSize)
        secondSize = other.source.virtualSize.roundedUp(to: guestSectorSize)
        let size = max(firstSize, secondSize)
        first = try Self.padded(one.source, firstSize, to: size)
        second = try Self.padded(other.source, secondSize, to: size)
        statuses =
            isStrict
            ? (
                try await BlockStatusReader(one.layers.map(\.image)),
                try await BlockStatusReader(other.layers.map(\.image))
            ) : nil
    }

    private static func padded(
        _ source: any ImageSource, _ ownSize: Int64, to size: Int64
    ) throws(ImageError) -> any ImageSource {
        if source.virtualSize == size { return source }
        let zeros = ZeroSource(virtualSize: size - ownSize)
        return try ConcatenatedSource(ownSize < size ? [source, zeros] : [source])
    }

    var size: Int64 { first.virtualSize }
    var readGranularity: Int64 { max(first.readGranularity, second.readGranularity) }

    /// The work to do from `offset` on, and the offset at which that ends: `limit` at most.
    ///
    /// - Throws: `ImageError` if metadata cannot be read.
    func step(at offset: Int64, limit: Int64) async throws -> (end: Int64, step: Step) {
        if let statuses { return try await strictStep(statuses, at: offset, limit: limit) }
        let one = try await first.extent(at: offset, limit: limit)
        let other = try await second.extent(at: offset, limit: one.range.upperBound)
        let step: Step =
            switch (Self.isZero(one), Self.isZero(other)) {
            case (true, true): .nothing
            case (true, false): .readSecond
            case (false, true): .readFirst
            case (false, false): .readBoth
            }
        return (other.range.upperBound, step)
    }

    private static func isZero(_ extent: Extent) -> Bool {
        extent.content == .zero || extent.content == .backing
    }

    private func strictStep(
        _ statuses: (BlockStatusReader, BlockStatusReader), at offset: Int64, limit: Int64
    ) async throws -> (end: Int64, step: Step) {
        let one = try await Self.status(statuses.0, at: offset, limit: limit)
        let other = try await Self.status(statuses.1, at: offset, limit: one.end)
        let step: Step =
            one.status != other.status
            ? .statusDiffers
            : one.status.isDisjoint(with: .zero) || one.status.contains(.missing)
                ? .readBoth : .nothing
        return (other.end, step)
    }

    /// Block status in whole sectors: the last, partial sector has the status of its first part.
    private static func status(
        _ reader: BlockStatusReader, at offset: Int64, limit: Int64
    ) async throws -> (end: Int64, status: BlockStatus) {
        let found = try await reader.status(at: offset, limit: min(limit, reader.virtualSize))
        let end = found.range.upperBound
        return (end == reader.virtualSize ? min(limit, end.roundedUp(to: 512)) : end, found.status)
    }
}
