import DiskImage
import ImageFormats

/// Writes the entries of a map as text in qemu-img's layout.
///
/// Text is collected in large pieces, because a map can have millions of lines.
public struct MapPrinter {
    public enum Form: Sendable {
        /// A table for people, of the ranges that lie in files.
        case table
        /// A JSON array with one object per line.
        case json
    }

    private static let pieceSize = 64 << 10

    private let form: Form
    private let fileNames: [[UInt8]]
    private let write: ([UInt8]) -> Void
    private var piece: [UInt8] = []
    private var isFirst = true

    /// - Parameters:
    ///   - fileNames: names of the images of the chain, by depth.
    ///   - write: called with UTF-8 text.
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

    /// - Throws: `ImageError` for an entry that the table cannot show.
    public mutating func add(_ mapping: Mapping) throws(ImageError) {
        switch form {
        case .json: addObject(mapping)
        case .table:
            guard mapping.isData, !mapping.isZero else { return }
            guard let hostOffset = mapping.hostOffset else {
                // The first words are qemu-img's, because callers search for them.
                throw .invalid(
                    "File contains external, encrypted or compressed clusters: --output=json shows "
                        + "them")
            }
            appendColumn(mapping.range.lowerBound)
            appendColumn(Int64(mapping.range.count))
            appendColumn(hostOffset)
            piece.append(contentsOf: fileNames[mapping.layer])
            append("\n")
        }
        if piece.count >= Self.pieceSize { flush() }
    }

    /// Writes the remaining text.
    ///
    /// - Parameter isWhole: false after an error; the text then ends without its closing bracket,
    ///   as qemu-img's does.
    public mutating func finish(isWhole: Bool = true) {
        if form == .json, isWhole { append("]\n") }
        flush()
    }

    private mutating func flush() {
        if !piece.isEmpty { write(piece) }
        piece.removeAll(keepingCapacity: true)
    }

    private mutating func addObject(_ mapping: Mapping) {
        if !isFirst { append(",\n") }
        isFirst = false
        append("{ \"start\": ")
        append(mapping.range.lowerBound)
        append(", \"length\": ")
        append(Int64(mapping.range.count))
        append(", \"depth\": ")
        append(Int64(mapping.layer))
        append(Self.flags(mapping.content))
        if let hostOffset = mapping.hostOffset {
            append(", \"offset\": ")
            append(hostOffset)
        }
        append("}")
    }

    /// Prints an object of length 0 for a map without entries, as qemu-img does.
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

    /// Formats digits by hand, because formatting is most of the work for a long map.
    ///
    /// - Parameter number: not negative.
    private mutating func append(_ number: Int64) {
        if number >= 10 { append(number / 10) }
        piece.append(UInt8(ascii: "0") + UInt8(truncatingIfNeeded: number % 10))
    }

    private static func flags(_ content: Mapping.Content) -> StaticString {
        switch content {
        case .unallocated: ", \"present\": false, \"zero\": true, \"data\": false"
        case .marked: ", \"present\": false, \"zero\": false, \"data\": false"
        case .zero, .hole: ", \"present\": true, \"zero\": true, \"data\": false"
        case .preallocated, .missing: ", \"present\": true, \"zero\": true, \"data\": true"
        case .data, .encrypted, .compressed: ", \"present\": true, \"zero\": false, \"data\": true"
        }
    }

    /// Appends a hexadecimal number padded to 16 columns; zero has no 0x prefix, as in qemu-img.
    private mutating func appendColumn(_ number: Int64) {
        let text = (number == 0 ? "" : "0x") + String(number, radix: 16)
        piece.append(contentsOf: text.utf8)
        piece.append(contentsOf: repeatElement(UInt8(ascii: " "), count: max(0, 16 - text.count)))
    }
}
