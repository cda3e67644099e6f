import DiskImage

/// The options of `-o` with known keys and values of the right kinds. The format's creator checks
/// that they are compatible.
public struct TypedOptions: Sendable {
    private let format: ImageFormat
    private let known: [OptionDescription]
    private let options: CreationOptions
    private var numbers: [String: Int64] = [:]
    private var switches: [String: Bool] = [:]

    /// - Throws: `ImageError` in qemu-img's words; also for a format that can only be read.
    public init(_ options: CreationOptions, for format: ImageFormat) throws(ImageError) {
        try self.init(options, for: format, known: try format.creator().options)
    }

    /// Reads options that change an existing image; throws as the other initializer.
    public init(amending options: CreationOptions, _ format: ImageFormat) throws(ImageError) {
        let known = try format.amender().options
        let created = try format.creator().options
        for (key, _) in options.values {
            func isKey(_ option: OptionDescription) -> Bool { option.name == key }
            guard !known.contains(where: isKey), created.contains(where: isKey) else { continue }
            throw .invalid(
                "Invalid parameter '\(key)': This option is only supported for image creation")
        }
        try self.init(options, for: format, known: known)
    }

    private init(
        _ options: CreationOptions, for format: ImageFormat, known: [OptionDescription]
    ) throws(ImageError) {
        self.format = format
        self.options = options
        self.known = known
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
            guard let number = Int64(asInC: value) else {
                throw .invalid("Parameter '\(option.name)' expects a number")
            }
            numbers[option.name] = number
        case .size: numbers[option.name] = try Int64(sizeOption: value, of: option.name)
        }
    }

    /// Refuses options that qemu-img has and this program does not support yet, unless they are
    /// off.
    func refuseKeys(startingWith prefixes: [String]) throws(ImageError) {
        for option in known where prefixes.contains(where: option.name.hasPrefix) {
            guard let value = text(option.name), isOn(option.name) != false else { continue }
            throw .invalid("option '\(option.name)=\(value)' is not supported yet")
        }
    }

    /// The keys that were given.
    var keys: [String] { options.values.map(\.key) }

    var secrets: Secrets { options.secrets }

    /// Whether a key with this prefix is given.
    func hasKeys(startingWith prefix: String) -> Bool {
        options.values.contains { $0.key.hasPrefix(prefix) }
    }

    public func text(_ key: String) -> String? { options.value(of: key)?.text }
    public func name(_ key: String) -> ImageName? {
        options.value(of: key).map { ImageName(bytes: $0) }
    }
    public func number(_ key: String) -> Int64? { numbers[key] }
    public func isOn(_ key: String) -> Bool? { switches[key] }

    /// The line that `qemu-img create` prints: all options in its order, with defaults.
    ///
    /// - Parameter size: the size of the guest disk in bytes.
    public func creationLine(_ path: ImageName, size: Int64) -> String {
        var line = "Formatting '\(path)', fmt=\(format.name)"
        for option in known {
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

extension Int64 {
    /// Reads a size in bytes in the form of qemu's options.
    ///
    /// - Throws: `ImageError` in qemu's words, with the option's name.
    public init(sizeOption text: String, of name: String) throws(ImageError) {
        switch ByteSizeText(text) {
        case .bytes(let bytes): self = bytes
        case .outOfRange: throw .invalid("Value '\(text)' is out of range for parameter '\(name)'")
        case .malformed:
            let words = "Parameter '\(name)' expects a non-negative number below 2^64"
            throw ImageError.invalid("\(words) (optional suffix k, M, G, T, P or E)").asQemu(
                words,
                hint: """
                    Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-
                    and exabytes, respectively.
                    """)
        }
    }
}
