import DiskImage

/// A value in a description.
public enum OptionValue: Sendable, Equatable {
    case null
    case bool(Bool)
    case integer(Int64)
    case string([UInt8])
    case array([OptionValue])
    case object([String: OptionValue])

    /// The values by dotted keys, which are equivalent to nested objects. Where both forms give a
    /// value, the nested one counts, as in qemu.
    public var flattened: [String: OptionValue] {
        var options: [String: OptionValue] = [:]
        flatten(into: &options, key: "")
        return options
    }

    private func flatten(into options: inout [String: OptionValue], key: String) {
        guard case .object(let members) = self else {
            options[key] = self
            return
        }
        for isNested in [false, true] {
            for (name, member) in members where member.isObject == isNested {
                member.flatten(into: &options, key: key.isEmpty ? name : "\(key).\(name)")
            }
        }
    }

    private var isObject: Bool { if case .object = self { true } else { false } }

    /// The value as it stands in a name that is shown.
    public var json: JSONValue {
        switch self {
        case .null: .null
        case .bool(let flag): .bool(flag)
        case .integer(let number): .integer(number)
        case .string(let bytes): .string(bytes.text)
        case .array(let items): .array(items.map(\.json))
        case .object(let members): .object(members.map { .init($0.key, $0.value.json) })
        }
    }
}
