import DiskImage
import ImageFormats

/// Writes the entries of a map as text, as qemu-img lays it out.
///
/// Text is gathered into large pieces: a map can have millions of lines.
public struct MapPrinter {
    public enum Form: Sendable {
        /// A table of what lies in files, for people.
        case table
        /// One object a line, in an array.
        case json
    }

    private static let pieceSize = 64 << 10

    private let form: Form
    private let fileNames: [[UInt8]]
    private let write: ([UInt8]) -> Void
    private var piece: [UInt8] = []
    private var isFirst = true

    /// - Parameters:
    ///   - fileNames: of the images of the chain, by depth.
    ///   - write: takes text in UTF-8.
    public init(_ form: Form, fileNames: [String], write: @escaping ([UInt8]) -> Void) {
        self.form = form
        self.fileNames = fileNames.map { Array($0.withoutControlCharacters.utf8) }
        self.write = write
        piece.reserveCapacity(Self.pieceSize + 4096)
        switch form {
        case .table: append("Offset          Length          Mapped to       File\n")
        case .json: append("[")
        }
    }

    /// - Throws: `ImageError` for what the table has no way to show.
    public mutating func add(_ entry: MapEntry) throws(ImageError) {
        switch form {
        case .json: addObject(entry)
        case .table:
            guard entry.isData, !entry.isZero else { return }
            guard let hostOffset = entry.hostOffset else {
                // qemu-img's words: callers look for them.
                throw .invalid(
                    "File contains external, encrypted or compressed clusters: --output=json shows "
                        + "them")
            }
            appendColumn(entry.range.lowerBound)
            appendColumn(Int64(entry.range.count))
            appendColumn(hostOffset)
            piece.append(contentsOf: fileNames[entry.depth])
            append("\n")
        }
        if piece.count >= Self.pieceSize { flush() }
    }

    /// Writes what is still to be written.
    ///
    /// - Parameter isWhole: false after an error: then the text ends where it is, as qemu-img's does.
    public mutating func finish(isWhole: Bool = true) {
        if form == .json, isWhole { append("]\n") }
        flush()
    }

    private mutating func flush() {
        if !piece.isEmpty { write(piece) }
        piece.removeAll(keepingCapacity: true)
    }

    private mutating func addObject(_ entry: MapEntry) {
        if !isFirst { append(",\n") }
        isFirst = false
        append("{ \"start\": ")
        append(entry.range.lowerBound)
        append(", \"length\": ")
        append(Int64(entry.range.count))
        append(", \"depth\": ")
        append(Int64(entry.depth))
        append(Self.flags(entry.content))
        if let hostOffset = entry.hostOffset {
            append(", \"offset\": ")
            append(hostOffset)
        }
        append("}")
    }

    /// An object for a map without entries: qemu-img prints one of length 0.
    public mutating func addNothing(at offset: Int64) {
        guard form == .json else { return }
        append("{ \"start\": ")
        append(offset)
        append(
            ", \"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \"data\": false}")
    }

    private mutating func append(_ text: StaticString) {
        text.withUTF8Buffer { piece.append(contentsOf: $0) }
    }

    /// Digits by hand: formatting is most of the work of a long map.
    ///
    /// - Parameter number: not negative.
    private mutating func append(_ number: Int64) {
        if number >= 10 { append(number / 10) }
        piece.append(UInt8(ascii: "0") + UInt8(truncatingIfNeeded: number % 10))
    }

    private static func flags(_ content: StoredRun.Content) -> StaticString {
        switch content {
        case .unallocated: ", \"present\": false, \"zero\": true, \"data\": false"
        case .zero, .hole: ", \"present\": true, \"zero\": true, \"data\": false"
        case .preallocated: ", \"present\": true, \"zero\": true, \"data\": true"
        case .data, .compressed: ", \"present\": true, \"zero\": false, \"data\": true"
        }
    }

    /// Hexadecimal, in 16 columns: zero has no prefix there.
    private mutating func appendColumn(_ number: Int64) {
        let text = (number == 0 ? "" : "0x") + String(number, radix: 16)
        piece.append(contentsOf: text.utf8)
        piece.append(contentsOf: repeatElement(UInt8(ascii: " "), count: max(0, 16 - text.count)))
    }
}
