import DiskImage
import NBDStorage

/// Converts qemu-img's command lines into the form that the argument parser reads.
///
/// qemu-img uses getopt, which accepts `-pn`, `-m8`, `-pOqcow2` and options after the paths. The
/// parser does not understand every joined form, so joined options are split first. A server's
/// command line in brackets, in nbdcopy's syntax, becomes one word. All words are in the form of
/// `ArgumentBytes`, so each character is one byte.
struct CommandLineWords {
    private let command: any ImageCommand.Type

    /// The words after the program's name, in the parser's form.
    static func normalized(_ words: [String]) throws(ImageError) -> [String] {
        guard let verb = words.first, let command = Swimg.command(named: verb) else {
            return words
        }
        return try [verb] + CommandLineWords(command: command).normalized(words.dropFirst())
    }

    private func normalized(_ words: ArraySlice<String>) throws(ImageError) -> [String] {
        var result: [String] = []
        var rest = words
        var isPastOptions = false
        while let word = rest.popFirst() {
            if word == "[" {
                result.append(try server(&rest))
            } else if isPastOptions || !word.hasPrefix("-") || word == "-" {
                result.append(word)
            } else if word.hasPrefix("--") {
                isPastOptions = word == "--"
                try checkLong(word)
                result.append(word)
            } else if command.hasSignedSize, word.dropFirst().first?.isNumber ?? false {
                result.append("\(Self.signedSizeMark)\(word)")
            } else {
                try takeApart(word.dropFirst(), &rest, &result)
            }
        }
        return result
    }

    /// Marks a word that begins with a minus sign but is a size, not an option.
    static let signedSizeMark: Character = "="

    /// Takes the words after an opening bracket, up to the closing one, as one word.
    private func server(_ rest: inout ArraySlice<String>) throws(ImageError) -> String {
        guard let end = rest.firstIndex(of: "]") else {
            throw .invalid("a server's command line has no closing ']'")
        }
        let words = Array(rest[..<end])
        rest = rest[(end + 1)...]
        guard !words.isEmpty else {
            throw .invalid("[ ] is empty: it needs the command of a server")
        }
        return ArgumentBytes.escaped(NBDServerCommand(words.map(ArgumentBytes.bytes)).name.bytes)
    }

    private func takeApart(
        _ word: Substring, _ rest: inout ArraySlice<String>, _ result: inout [String]
    ) throws(ImageError) {
        var word = word
        while let letter = word.popFirst() {
            if command.unsupportedOptions.contains(String(letter)) {
                throw unsupported("-\(letter)")
            }
            result.append("-\(letter)")
            // A flag, or unknown, which the parser reports.
            guard command.valuedLetters.contains(letter) else { continue }
            if !word.isEmpty {
                result.append(String(word))
            } else if let value = rest.popFirst() {
                result.append(value)
            }
            return
        }
    }

    private func checkLong(_ word: String) throws(ImageError) {
        let name = word.dropFirst(2).prefix { $0 != "=" }
        if command.unsupportedOptions.contains(String(name)) { throw unsupported("--\(name)") }
    }

    private func unsupported(_ option: String) -> ImageError {
        .invalid("option '\(option)' is not supported yet")
    }
}
