import DiskImage

/// The options of a new image as `-o` gives them, in text: `key=value,key=value`.
public struct CreationOptions: Sendable {
    public private(set) var values: [(key: String, value: [UInt8])] = []
    /// Whether `help` or `?` is among the keys: list the options instead of creating an image.
    public private(set) var asksForHelp = false
    /// The secrets that options can name.
    public var secrets = Secrets()

    public init() {}

    /// Reads the options of several `-o`; see `add`.
    public init(_ lists: [[UInt8]]) throws(ImageError) {
        for list in lists { try add(list) }
    }

    public var isEmpty: Bool { values.isEmpty }

    /// Adds the options of one `-o`. As in qemu, a doubled comma stands for a comma in a value, a
    /// key alone means `key=on`, and `nokey` means `key=off`.
    ///
    /// - Throws: `ImageError` for a text that is no list.
    public mutating func add(_ text: [UInt8]) throws(ImageError) {
        guard OptionWords.isList(text) else {
            throw .invalid("Invalid option list: \(text.text)")
        }
        for word in OptionWords.split(text) {
            if let (key, value) = OptionWords.sides(of: word) {
                set(key, value)
                continue
            }
            switch word.text {
            case "help", "?": asksForHelp = true
            case "nocow": set("nocow", "on")
            case let key where key.hasPrefix("no"): set(String(key.dropFirst(2)), "off")
            case let key: set(key, "on")
            }
        }
    }

    /// The last value of a repeated key wins.
    package func value(of key: String) -> [UInt8]? { values.last { $0.key == key }?.value }

    package mutating func set(_ key: String, _ value: [UInt8]) { values.append((key, value)) }

    package mutating func set(_ key: String, _ value: String) { set(key, Array(value.utf8)) }
}
