import DiskImage
import ImageFormats

/// A guest disk as a field of cells, each a part of it, for people to look at.
///
/// Memory is for the cells, whatever the number of entries.
public struct MapPicture: Sendable {
    /// What a cell can show.
    enum Kind: Int, CaseIterable, Sendable {
        case data, compressed, preallocated, zero, hole

        init(_ content: StoredRun.Content) {
            switch content {
            case .data: self = .data
            case .compressed: self = .compressed
            case .preallocated: self = .preallocated
            case .zero: self = .zero
            case .hole, .unallocated: self = .hole
            }
        }

        /// Whether it comes from one of the images, which is worth showing.
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

    /// A kind and, where it counts, an image of the chain.
    struct Part: Hashable, Sendable {
        var kind: Kind
        var layer: Int

        /// Deeper chains show all that is below as one.
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

    /// How the data lies in the files.
    struct HostOrder: Sendable {
        /// Runs of data without a gap, on the disk and in the file.
        var pieces = 0
        var bytes: Int64 = 0
        /// Pieces that lie before the one they follow on the disk.
        var stepsBack = 0
        /// Where the last piece of each image ended.
        var ends: [Int: Int64] = [:]
    }

    private static let mostRows: Int64 = 16

    /// Guest offsets in bytes.
    let range: Range<Int64>
    let layers: [String]
    let cellsPerRow: Int
    /// In bytes, a power of two.
    let cellSize: Int64
    private(set) var sums = [Sum](repeating: Sum(), count: Part.count)
    private(set) var order = HostOrder()
    /// Bytes by cell and part.
    private var cells: [Int64]

    /// - Parameters:
    ///   - range: the part of the disk to show, guest offsets in bytes.
    ///   - layers: names of the images of the chain, by depth.
    ///   - columns: how many characters there are in a line.
    public init(_ range: Range<Int64>, layers: [String], columns: Int) {
        self.range = range
        self.layers = layers
        // Powers of two make round offsets at the start of each row.
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

    public mutating func add(_ entry: MapEntry) {
        let part = Part(Kind(entry.content), layer: entry.depth)
        sums[part.index].bytes += Int64(entry.range.count)
        sums[part.index].extents += 1
        var position = entry.range.lowerBound
        while position < entry.range.upperBound {
            let (cell, inCell) = (position - range.lowerBound).quotientAndRemainder(
                dividingBy: cellSize)
            let end = position + min(entry.range.upperBound - position, cellSize - inCell)
            cells[Int(cell) * Part.count + part.index] += end - position
            position = end
        }
        if entry.isData, let hostOffset = entry.hostOffset { note(entry, at: hostOffset) }
    }

    private mutating func note(_ entry: MapEntry, at hostOffset: Int64) {
        if let end = order.ends[entry.depth], hostOffset < end { order.stepsBack += 1 }
        order.pieces += 1
        order.bytes += Int64(entry.range.count)
        order.ends[entry.depth] = hostOffset + Int64(entry.range.count)
    }

    /// What is shown of a cell.
    struct Look: Hashable, Sendable {
        var part: Part
        /// How much of the cell it fills, in eighths: 1 to 8.
        var level = 8
    }

    /// Data shows wherever there is some; otherwise what there is most of.
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

    // MARK: Words that both forms use

    var title: String {
        "\(layers[0]): \(TextLayout.size(UInt64(range.count))), "
            + "a cell is \(TextLayout.size(UInt64(cellSize)))"
    }

    /// The parts that there are, with their names and sums.
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

    /// One line on how the data lies in the files.
    var orderText: String {
        guard order.pieces > 0 else { return "No data lies in the files as it is." }
        let average = TextLayout.size(UInt64(order.bytes / Int64(order.pieces)))
        return "Fragmentation: \(order.pieces) \(order.pieces == 1 ? "piece" : "pieces") of "
            + "\(average) on average, \(order.stepsBack) steps backwards in the file."
    }
}
