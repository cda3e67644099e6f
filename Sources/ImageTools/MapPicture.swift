import DiskImage
import ImageFormats

/// A guest disk as a grid of cells, each a part of the disk, for people to look at.
///
/// Memory depends on the number of cells, not on the number of entries.
public struct MapPicture: Sendable {
    /// The kinds of content that a cell can show.
    enum Kind: Int, CaseIterable, Sendable {
        case data, compressed, preallocated, zero, hole

        init(_ content: Mapping.Content) {
            switch content {
            case .data, .encrypted, .marked: self = .data
            case .compressed: self = .compressed
            case .preallocated, .missing: self = .preallocated
            case .zero: self = .zero
            case .hole, .unallocated: self = .hole
            }
        }

        /// Whether the picture shows which image of the chain holds this kind.
        var hasLayer: Bool { self == .data || self == .compressed }

        var name: String {
            switch self {
            case .data: "data"
            case .compressed: "compressed"
            case .preallocated: "preallocated"
            case .zero: "zeros"
            case .hole: "nothing"
            }
        }
    }

    /// A kind and, if the kind has layers, an image of the chain.
    struct Part: Hashable, Sendable {
        var kind: Kind
        var layer: Int

        /// Number of layers shown; deeper ones count as the last.
        static let layerCount = 10
        static let count = Kind.allCases.count * layerCount

        init(_ kind: Kind, layer: Int) {
            self.kind = kind
            self.layer = kind.hasLayer ? min(layer, Self.layerCount - 1) : 0
        }

        var index: Int { kind.rawValue * Self.layerCount + layer }

        static let all = Kind.allCases.flatMap { kind in
            (0..<(kind.hasLayer ? layerCount : 1)).map { Part(kind, layer: $0) }
        }
    }

    struct Sum: Sendable {
        var bytes: Int64 = 0
        var extents = 0
    }

    /// The order of the data in the files.
    struct HostOrder: Sendable {
        /// Number of runs that are contiguous on the disk and in the file.
        var pieces = 0
        var bytes: Int64 = 0
        /// Number of pieces whose host offset is below the end of the previous piece in guest
        /// order.
        var stepsBack = 0
        /// The end of the last piece in each image's file, in bytes, by depth.
        var ends: [Int: Int64] = [:]
    }

    private static let mostRows: Int64 = 16

    /// Guest offsets in bytes.
    let range: Range<Int64>
    let layers: [String]
    let cellsPerRow: Int
    /// Size of a cell in bytes, a power of two.
    let cellSize: Int64
    private(set) var sums = [Sum](repeating: Sum(), count: Part.count)
    private(set) var order = HostOrder()
    /// Number of bytes for each cell and part.
    private var cells: [Int64]

    /// - Parameters:
    ///   - range: the part of the disk to show, guest offsets in bytes.
    ///   - layers: names of the images of the chain, by depth.
    ///   - columns: the width of a line in characters.
    public init(_ range: Range<Int64>, layers: [String], columns: Int) {
        self.range = range
        self.layers = layers
        // A power of two makes each row start at a round offset.
        var perRow = 8
        while perRow * 2 < min(columns, 512) - Self.labelWidth { perRow *= 2 }
        cellsPerRow = perRow
        let wanted = Int64(range.count).dividedUp(by: Int64(cellsPerRow) * Self.mostRows)
        var size = guestSectorSize
        while size < wanted { size *= 2 }
        cellSize = size
        let count = Int64(range.count).dividedUp(by: size)
        cells = [Int64](repeating: 0, count: Int(count) * Part.count)
    }

    static let labelWidth = 10

    var cellCount: Int { cells.count / Part.count }

    public mutating func add(_ mapping: Mapping) {
        let part = Part(Kind(mapping.content), layer: mapping.layer)
        sums[part.index].bytes += Int64(mapping.range.count)
        sums[part.index].extents += 1
        var position = mapping.range.lowerBound
        while position < mapping.range.upperBound {
            let (cell, inCell) = (position - range.lowerBound).quotientAndRemainder(
                dividingBy: cellSize)
            let end = position + min(mapping.range.upperBound - position, cellSize - inCell)
            cells[Int(cell) * Part.count + part.index] += end - position
            position = end
        }
        if mapping.isData, let hostOffset = mapping.hostOffset { note(mapping, at: hostOffset) }
    }

    private mutating func note(_ mapping: Mapping, at hostOffset: Int64) {
        if let end = order.ends[mapping.layer], hostOffset < end { order.stepsBack += 1 }
        order.pieces += 1
        order.bytes += Int64(mapping.range.count)
        order.ends[mapping.layer] = hostOffset + Int64(mapping.range.count)
    }

    /// The appearance of a cell.
    struct Look: Hashable, Sendable {
        var part: Part
        /// The share of the cell that stored data fills, in eighths: 1 to 8.
        var level = 8
    }

    /// The appearance of a cell: the most frequent stored part if the cell stores any data,
    /// otherwise the most frequent part.
    func look(_ cell: Int) -> Look {
        func bytes(_ part: Part) -> Int64 { cells[cell * Part.count + part.index] }
        let stored = Part.all.filter { $0.kind.hasLayer }
        let storedBytes = stored.reduce(0) { $0 + bytes($1) }
        let candidates = storedBytes > 0 ? stored : Part.all.filter { !$0.kind.hasLayer }
        let part = candidates.max { bytes($0) < bytes($1) } ?? Part(.hole, layer: 0)
        guard storedBytes > 0 else { return Look(part: part) }
        let size = min(cellSize, Int64(range.count) - Int64(cell) * cellSize)
        return Look(part: part, level: Int(max(1, storedBytes / max(1, size.dividedUp(by: 8)))))
    }

    // MARK: Text in both forms

    var title: String {
        "\(layers[0]): \(TextLayout.size(UInt64(range.count))), "
            + "a cell is \(TextLayout.size(UInt64(cellSize)))"
    }

    /// The parts that occur, with their names and sums.
    var legend: [(part: Part, text: String)] {
        Part.all.filter { sums[$0.index].extents > 0 }.map { part in
            let sum = sums[part.index]
            let percent = Double(sum.bytes) * 100 / Double(max(1, range.count))
            return (
                part,
                TextLayout.padded(name(part), to: 14)
                    + TextLayout.padded(10, TextLayout.size(UInt64(sum.bytes)))
                    + TextLayout.format("%7.1f %%", percent)
                    + TextLayout.padded(10, "\(sum.extents)")
                    + (sum.extents == 1 ? " extent" : " extents") + origin(part)
            )
        }
    }

    private func name(_ part: Part) -> String {
        part.layer == 0 ? part.kind.name : "\(part.kind.name) (\(part.layer))"
    }

    private func origin(_ part: Part) -> String {
        guard part.kind.hasLayer, layers.count > 1 else { return "" }
        let isSeveral = part.layer == Part.layerCount - 1 && layers.count > Part.layerCount
        return "  \(layers[part.layer])" + (isSeveral ? " and below" : "")
    }

    /// One line about the fragmentation of the files.
    var orderText: String {
        guard order.pieces > 0 else { return "No data is stored uncompressed." }
        let average = TextLayout.size(UInt64(order.bytes / Int64(order.pieces)))
        return "Fragmentation: \(order.pieces) \(order.pieces == 1 ? "piece" : "pieces") of "
            + "\(average) on average, \(order.stepsBack) steps backwards in the file."
    }
}
