import DiskImage
import ImageFormats

/// What `-o` says about a new image, still as text: `key=value,key=value`.
public struct CreationOptions: Sendable, Equatable {
    public private(set) var values: [(key: String, value: String)] = []
    /// `help` or `?` was among the keys: the options are to be listed, and nothing is to be done.
    public private(set) var asksForHelp = false

    public init() {}

    public static func == (left: Self, right: Self) -> Bool {
        left.asksForHelp == right.asksForHelp
            && left.values.elementsEqual(right.values) { $0 == $1 }
    }

    public var isEmpty: Bool { values.isEmpty }

    /// Adds the options of one `-o`. A doubled comma stands for a comma in a value, as with qemu; a key
    /// alone means `key=on`, with `no` before it `key=off`.
    ///
    /// - Throws: `ImageError` for a list with an empty place in it.
    public mutating func add(_ text: String) throws(ImageError) {
        let words = OptionWords.split(text)
        guard !words.isEmpty, !words.contains("") else {
            throw .invalid("Invalid option list: \(text)")
        }
        for word in words {
            if let equals = word.firstIndex(of: "=") {
                let key = String(word[..<equals])
                set(key, String(word[word.index(after: equals)...]))
            } else if word == "help" || word == "?" {
                asksForHelp = true
            } else if word.hasPrefix("no"), word != "nocow" {
                set(String(word.dropFirst(2)), "off")
            } else {
                set(word, "on")
            }
        }
    }

    /// The last value of a repeated key wins.
    package func value(of key: String) -> String? { values.last { $0.key == key }?.value }

    package mutating func set(_ key: String, _ value: String) { values.append((key, value)) }
}
