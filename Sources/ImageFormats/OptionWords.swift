/// qemu's lists of options: `key=value,key=value`.
public enum OptionWords {
    /// What stands between the commas, also nothing. A doubled comma stands for a comma in a value.
    public static func split(_ text: String) -> [String] {
        var words = [""]
        var rest = text[...]
        while let character = rest.popFirst() {
            if character != "," {
                words[words.count - 1].append(character)
            } else if rest.first == "," {
                rest.removeFirst()
                words[words.count - 1].append(",")
            } else {
                words.append("")
            }
        }
        return words
    }
}
