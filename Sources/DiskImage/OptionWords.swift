/// qemu's lists of options: `key=value,key=value`. Values can be file names, so they are bytes.
public enum OptionWords {
    private static let comma = UInt8(ascii: ",")

    /// Splits a list at its commas, and keeps empty words. A doubled comma stands for a comma in a
    /// value.
    public static func split(_ text: some Collection<UInt8>) -> [[UInt8]] {
        var words: [[UInt8]] = [[]]
        var rest = text[...]
        while let byte = rest.popFirst() {
            if byte != comma {
                words[words.count - 1].append(byte)
            } else if rest.first == comma {
                rest.removeFirst()
                words[words.count - 1].append(comma)
            } else {
                words.append([])
            }
        }
        return words
    }

    /// The two sides of a word's first equals sign; nil if there is none.
    public static func sides(of word: [UInt8]) -> (key: String, value: [UInt8])? {
        guard let equals = word.firstIndex(of: UInt8(ascii: "=")) else { return nil }
        return (word[..<equals].text, Array(word[(equals + 1)...]))
    }
}
