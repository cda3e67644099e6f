/// A JSON document to be printed as qemu-img does, with its keys in the order given.
///
/// Our own, because programs read our output beside qemu-img's and people compare the two line by
/// line: no encoder lets us choose order, indentation and spaces like that.
public enum JSONValue: Sendable, Equatable {
    case null
    case string(String)
    case integer(Int64)
    case bool(Bool)
    case array([JSONValue])
    case object([Member])

    public struct Member: Sendable, Equatable {
        public var key: String
        public var value: JSONValue

        public init(_ key: String, _ value: JSONValue) {
            self.key = key
            self.value = value
        }
    }

    /// An object with its keys in qemu's order, which is that of their hashes in its dictionaries
    /// (qobject/qdict.c).
    public static func inQemuOrder(_ members: [Member]) -> JSONValue {
        .object(members.sorted { bucket($0.key) < bucket($1.key) })
    }

    private static func bucket(_ key: String) -> UInt32 {
        var hash = 0x238f_13af &* UInt32(truncatingIfNeeded: key.utf8.count)
        for (index, byte) in key.utf8.enumerated() {
            hash &+= UInt32(byte) << UInt32(index * 5 % 24)
        }
        return (1_103_515_243 &* hash &+ 12345) % 512
    }

    /// The document, four spaces for each level, without a line break at the end.
    public var text: String {
        var bytes: [UInt8] = []
        append(to: &bytes, level: 0)
        return String(decoding: bytes, as: UTF8.self)
    }

    /// The document in one line, as qemu writes it in names.
    public var line: String {
        var bytes: [UInt8] = []
        append(to: &bytes, level: nil)
        return String(decoding: bytes, as: UTF8.self)
    }

    /// Appends to one buffer: a stranger's image can make a document of any number of parts.
    ///
    /// - Parameter level: nil writes all in one line.
    private func append(to bytes: inout [UInt8], level: Int?) {
        switch self {
        case .null: bytes += "null".utf8
        case .string(let string): Self.appendQuoted(string, to: &bytes)
        case .integer(let number): bytes += String(number).utf8
        case .bool(let flag): bytes += (flag ? "true" : "false").utf8
        case .array(let items):
            Self.append(items, "[", "]", to: &bytes, level: level) { item, bytes in
                item.append(to: &bytes, level: level.map { $0 + 1 })
            }
        case .object(let members):
            Self.append(members, "{", "}", to: &bytes, level: level) { member, bytes in
                Self.appendQuoted(member.key, to: &bytes)
                bytes += ": ".utf8
                member.value.append(to: &bytes, level: level.map { $0 + 1 })
            }
        }
    }

    private static func append<Item>(
        _ items: [Item], _ open: String, _ close: String, to bytes: inout [UInt8], level: Int?,
        _ appendItem: (Item, inout [UInt8]) -> Void
    ) {
        func newLine(_ deeper: Int) {
            guard let level else { return }
            bytes.append(UInt8(ascii: "\n"))
            bytes += repeatElement(UInt8(ascii: " "), count: 4 * (level + deeper))
        }
        bytes += open.utf8
        for (index, item) in items.enumerated() {
            if index > 0 { bytes += (level == nil ? ", " : ",").utf8 }
            newLine(1)
            appendItem(item, &bytes)
        }
        newLine(0)
        bytes += close.utf8
    }

    /// Appends a JSON string literal (RFC 8259, section 7), ASCII only like qemu's.
    private static func appendQuoted(_ string: String, to bytes: inout [UInt8]) {
        let digits = Array("0123456789ABCDEF".utf8)
        bytes.append(0x22)
        for unit in string.utf16 {
            switch unit {
            case 0x22: bytes += "\\\"".utf8
            case 0x5c: bytes += "\\\\".utf8
            case 0x08: bytes += "\\b".utf8
            case 0x0c: bytes += "\\f".utf8
            case 0x0a: bytes += "\\n".utf8
            case 0x0d: bytes += "\\r".utf8
            case 0x09: bytes += "\\t".utf8
            case 0x20..<0x7f: bytes.append(UInt8(unit))
            default:
                bytes += "\\u".utf8
                for shift in [12, 8, 4, 0] { bytes.append(digits[Int(unit >> UInt16(shift) & 15)]) }
            }
        }
        bytes.append(0x22)
    }
}
