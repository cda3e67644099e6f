import DiskImage
import ImageDrivers
import ImageFormats

/// Two guest disks side by side; the shorter one reads as zeros after its end.
struct ImagePair: Sendable {
    /// The work that a range needs.
    enum Work: Sendable, Equatable {
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

    func walk() -> Walk { Walk(self) }

    /// One way over both disks, front to back.
    struct Walk {
        /// A range with the work that it needs.
        struct Step {
            /// Guest offsets in bytes.
            var range: Range<Int64>
            var work: Work
            /// The places of the bytes; empty in strict mode, whose mappings are not for reading.
            var first: [Mapping] = []
            var second: [Mapping] = []
        }

        private var first: MappingWalk
        private var second: MappingWalk
        private var statuses: (BlockStatusReader, BlockStatusReader)?

        fileprivate init(_ pair: ImagePair) {
            first = MappingWalk(pair.first)
            second = MappingWalk(pair.second)
            statuses = pair.statuses
        }

        /// The work to do from `offset` on, up to `limit` at most.
        ///
        /// - Throws: `ImageError` if metadata cannot be read.
        mutating func step(at offset: Int64, limit: Int64) async throws -> Step {
            if statuses != nil { return try await strictStep(at: offset, limit: limit) }
            // As long as possible: neighbours are read together. Differences are counted in sectors
            // from the start of a step, so a disk that ends within a sector has that alone.
            let sectorEnd = offset.roundedUp(to: guestSectorSize)
            let limit = sectorEnd > offset ? min(sectorEnd, limit) : limit
            var step = Step(range: offset..<offset, work: .nothing)
            while step.range.upperBound < limit {
                try Task.checkCancellation()
                let position = step.range.upperBound
                let one: Mapping
                let other: Mapping
                do {
                    one = try await first.mapping(at: position, limit: limit)
                    other = try await second.mapping(at: position, limit: limit)
                } catch {
                    // The part before the damage is compared first.
                    if position > offset { break }
                    throw error
                }
                let work = Self.work(one, other)
                // Reading what is missing throws, so it has a step of its own.
                let isMissing = one.content == .missing || other.content == .missing
                if position > offset, work != step.work || isMissing { break }
                step.work = work
                step.range = offset..<min(one.range.upperBound, other.range.upperBound)
                guard work != .nothing else { continue }
                Self.append(one, to: &step.first)
                Self.append(other, to: &step.second)
            }
            step.first.clipLast(to: step.range)
            step.second.clipLast(to: step.range)
            return step
        }

        private static func work(_ one: Mapping, _ other: Mapping) -> Work {
            switch (one.needsReading, other.needsReading) {
            case (false, false): .nothing
            case (false, true): .readSecond
            case (true, false): .readFirst
            case (true, true): .readBoth
            }
        }

        /// Adds a mapping, unless it is the rest of the last one.
        private static func append(_ mapping: Mapping, to list: inout [Mapping]) {
            if list.last.map({ $0.range.upperBound <= mapping.range.lowerBound }) ?? true {
                list.append(mapping)
            }
        }

        private mutating func strictStep(at offset: Int64, limit: Int64) async throws -> Step {
            guard var (one, other) = statuses else { preconditionFailure() }
            let (end, status) = try await one.status(at: offset, limit: limit)
            let (otherEnd, otherStatus) = try await other.status(at: offset, limit: end)
            statuses = (one, other)
            let work: Work =
                status != otherStatus
                ? .statusDiffers
                : status.isDisjoint(with: .zero) || status.contains(.missing)
                    ? .readBoth : .nothing
            return Step(range: offset..<otherEnd, work: work)
        }
    }
}

extension [Mapping] {
    fileprivate mutating func clipLast(to range: Range<Int64>) {
        if let last { self[count - 1] = last.clipped(to: range) }
    }
}
