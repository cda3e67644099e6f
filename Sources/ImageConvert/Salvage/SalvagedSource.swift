import DiskImage
import Synchronization

/// A disk of which only a part can be read (`--salvage`): the rest is zeros.
final class SalvagedSource: ImageSource {
    let layers: [any ImageLayer]
    private let source: any ImageSource
    private let note: @Sendable (Range<Int64>, ImageError) -> Void
    /// Unit in bytes in which mappings are given up: what one entry of a table maps.
    private let unit: Int64
    /// Length in bytes of the next question for mappings. One that fails is asked again for less,
    /// and what follows it begins with as little, because a table that cannot be read maps much.
    private let reach = Atomic<Int64>(.max)

    /// - Parameter note: called from any task with guest offsets in bytes that read as zeros.
    init(
        _ source: any ImageSource, note: @escaping @Sendable (Range<Int64>, ImageError) -> Void
    ) {
        self.source = source
        self.note = note
        layers = source.layers.map { SalvagedLayer(layer: $0, note: note) }
        unit = max(guestSectorSize, source.layers.map(\.readGranularity).min() ?? 1)
    }

    var virtualSize: Int64 { source.virtualSize }

    func mappings(at offset: Int64, limit: Int64, holes: HoleSearch) async throws -> [Mapping] {
        var count = min(limit - offset, reach.load(ordering: .relaxed))
        while true {
            do {
                let found = try await source.mappings(
                    at: offset, limit: offset + count, holes: holes)
                reach.store(count > .max / 4 ? .max : count * 4, ordering: .relaxed)
                return found
            } catch let error as ImageError where error.isAboutPlace {
                let least = min(limit, (offset + 1).roundedUp(to: unit)) - offset
                reach.store(least, ordering: .relaxed)
                guard count > least else {
                    note(offset..<offset + count, error)
                    return [Mapping(offset..<offset + count, .zero)]
                }
                count = max(least, count / 4)
            }
        }
    }
}

/// An image of such a disk.
private struct SalvagedLayer: ImageLayer {
    let layer: any ImageLayer
    let note: @Sendable (Range<Int64>, ImageError) -> Void

    var readGranularity: Int64 { layer.readGranularity }
    /// Blocks that cannot be read can be shared, and the target could not be read either.
    var holder: (any BlockHolder)? { nil }
    func isSparse() async throws -> Bool { try await layer.isSparse() }

    /// Reads halves of what could not be read as a whole, down to sectors and compressed clusters.
    func read(_ mappings: ArraySlice<Mapping>, into buffer: inout MutableRawSpan) async throws {
        do {
            try await layer.read(mappings, into: &buffer)
        } catch let error as ImageError where error.isAboutPlace {
            try Task.checkCancellation()
            guard let (front, back) = Self.halves(of: mappings) else {
                buffer.zeroFill(0..<buffer.byteCount)
                for lost in mappings {
                    note(lost.layerOffset..<lost.layerOffset + Int64(lost.range.count), error)
                }
                return
            }
            let cut = front.reduce(0) { $0 + $1.range.count }
            var first = buffer.slice(0..<cut)
            try await read(front, into: &first)
            var second = buffer.slice(cut..<buffer.byteCount)
            try await read(back, into: &second)
        }
    }

    /// - Returns: nil for a sector, or for a part of a cluster that is read as a whole.
    private static func halves(
        of mappings: ArraySlice<Mapping>
    ) -> (ArraySlice<Mapping>, ArraySlice<Mapping>)? {
        guard mappings.count <= 1 else {
            let middle = mappings.startIndex + mappings.count / 2
            return (mappings[..<middle], mappings[middle...])
        }
        guard let only = mappings.first, [.data, .encrypted].contains(only.content) else {
            return nil
        }
        let half = only.layerOffset + Int64(only.range.count) / 2
        let cut = only.range.lowerBound + half.roundedUp(to: guestSectorSize) - only.layerOffset
        guard only.range.lowerBound < cut, cut < only.range.upperBound else { return nil }
        return (
            [only.clipped(to: only.range.lowerBound..<cut)],
            [only.clipped(to: cut..<only.range.upperBound)]
        )
    }
}
