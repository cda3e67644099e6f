/// qemu's lists of options: `key=value,key=value`. Values can be file names, so they are bytes.
public enum OptionWords {
    private static let comma = UInt8(ascii: ",")

    /// Splits a list at its commas, and keeps empty words. In a value, behind an equals sign, a
    /// doubled comma stands for a comma.
    public static func split(_ text: some Collection<UInt8>) -> [[UInt8]] {
        var words: [[UInt8]] = [[]]
        var rest = text[...]
        while let byte = rest.popFirst() {
            if byte != comma {
                words[words.count - 1].append(byte)
            } else if rest.first == comma, words[words.count - 1].contains(UInt8(ascii: "=")) {
                rest.removeFirst()
                words[words.count - 1].append(comma)
            } else {
                words.append([])
            }
        }
        return words
    }

    /// Whether qemu-img takes a text for a list: it does not begin with a comma, and it ends
    /// with none but doubled ones.
    public static func isList(_ text: [UInt8]) -> Bool {
        guard let first = text.first, first != comma else { return false }
        return text.reversed().prefix { $0 == comma }.count.isMultiple(of: 2)
    }

    /// The two sides of a word's first equals sign; nil if there is none.
    public static func sides(of word: [UInt8]) -> (key: String, value: [UInt8])? {
        guard let equals = word.firstIndex(of: UInt8(ascii: "=")) else { return nil }
        return (word[..<equals].text, Array(word[(equals + 1)...]))
    }
}
