/// A JSON document to be printed, with its keys in the order given, laid out as qemu-img does.
///
/// Our own, because programs read our output beside qemu-img's and people compare them line by line:
/// no encoder lets one choose order, indentation and spaces like that.
public enum JSONValue: Sendable, Equatable {
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

    /// The document, four spaces for each level, without a line break at the end.
    public var text: String { text(indentation: "") }

    private func text(indentation: String) -> String {
        let inner = indentation + "    "
        func lines(_ items: [String], _ open: String, _ close: String) -> String {
            let body = items.map { inner + $0 }.joined(separator: ",\n")
            return items.isEmpty
                ? "\(open)\n\(indentation)\(close)" : "\(open)\n\(body)\n\(indentation)\(close)"
        }
        switch self {
        case .string(let string): return Self.quoted(string)
        case .integer(let number): return String(number)
        case .bool(let flag): return flag ? "true" : "false"
        case .array(let items):
            return lines(items.map { $0.text(indentation: inner) }, "[", "]")
        case .object(let members):
            return lines(
                members.map { "\(Self.quoted($0.key)): \($0.value.text(indentation: inner))" },
                "{", "}")
        }
    }

    /// A JSON string literal (RFC 8259, section 7), ASCII only as qemu's are.
    static func quoted(_ string: String) -> String {
        var result = "\""
        for unit in string.utf16 {
            switch unit {
            case 0x22: result += "\\\""
            case 0x5c: result += "\\\\"
            case 0x08: result += "\\b"
            case 0x0c: result += "\\f"
            case 0x0a: result += "\\n"
            case 0x0d: result += "\\r"
            case 0x09: result += "\\t"
            case 0x20..<0x7f: result.unicodeScalars.append(Unicode.Scalar(UInt8(unit)))
            default:
                let digits = String(unit, radix: 16, uppercase: true)
                result += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
            }
        }
        return result + "\""
    }
}
