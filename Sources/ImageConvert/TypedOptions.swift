import DiskImage
import ImageFormats

/// The options of `-o` with their values read: each key is known and each value of its kind. Whether
/// they make sense together is for `ImageParameters`.
package struct TypedOptions: Sendable {
    package let format: ImageFormat
    private let options: CreationOptions
    private var numbers: [String: Int64] = [:]
    private var switches: [String: Bool] = [:]

    /// - Throws: `ImageError` in qemu-img's words.
    package init(_ options: CreationOptions, for format: ImageFormat) throws(ImageError) {
        self.format = format
        self.options = options
        let known = OptionSchema.options(of: format)
        for (key, value) in options.values {
            guard let option = known.first(where: { $0.name == key }) else {
                throw .invalid("Invalid parameter '\(key)'")
            }
            try read(option, value.text)
        }
    }

    private mutating func read(
        _ option: OptionDescription, _ value: String
    ) throws(ImageError) {
        switch option.kind {
        case .text: break
        case .switchable:
            switch value {
            case "on", "yes", "true", "y": switches[option.name] = true
            case "off", "no", "false", "n": switches[option.name] = false
            default: throw .invalid("Parameter '\(option.name)' expects 'on' or 'off'")
            }
        case .number:
            guard let number = Int64(value) else {
                throw .invalid("Parameter '\(option.name)' expects a number")
            }
            numbers[option.name] = number
        case .size: numbers[option.name] = try sizeValue(value, of: option.name)
        }
    }

    package func text(_ key: String) -> String? { options.value(of: key)?.text }
    package func name(_ key: String) -> ImageName? {
        options.value(of: key).map { ImageName(bytes: $0) }
    }
    package func number(_ key: String) -> Int64? { numbers[key] }
    package func isOn(_ key: String) -> Bool? { switches[key] }

    /// What qemu-img prints when it creates an image: the options in its order, the usual values filled in.
    ///
    /// - Parameter size: of the guest disk, in bytes.
    package func creationLine(_ path: ImageName, size: Int64) -> String {
        var line = "Formatting '\(path)', fmt=\(format.rawValue)"
        for option in OptionSchema.options(of: format) {
            let given = option.name == "size" ? "\(size)" : text(option.name)
            guard let value = given ?? option.usual else { continue }
            switch option.kind {
            case .text:
                let escaped = value.split(separator: ",", omittingEmptySubsequences: false)
                    .joined(separator: ",,")
                line += " \(option.name)=\(escaped)"
            case .number, .size:
                line += " \(option.name)=\(number(option.name).map { "\($0)" } ?? value)"
            case .switchable: line += " \(option.name)=\(value)"
            }
        }
        return line
    }
}

/// A size in bytes as qemu's options take it.
package func sizeValue(_ text: String, of name: String) throws(ImageError) -> Int64 {
    guard let bytes = parseByteSize(text) else {
        throw .invalid(
            "Parameter '\(name)' expects a non-negative number below 2^64 "
                + "(optional suffix k, M, G, T, P or E)")
    }
    return bytes
}
