import DiskImage
import NBDStorage

/// Brings qemu-img's command lines into the form that the argument parser reads.
///
/// qemu-img uses getopt: `-pn`, `-m8`, `-pOqcow2` and options behind the paths are all allowed
/// there. The parser knows none of the joined forms together, so they are taken apart first. And a
/// server's command line in brackets, as nbdcopy has it, becomes one word. Words are in the form of
/// `ArgumentBytes`, so that each character of theirs is one byte.
struct CommandLineWords {
    private let letters: OptionLetters

    /// The words behind the program's name, as the parser wants them.
    static func normalized(_ words: [String]) throws(ImageError) -> [String] {
        guard let verb = words.first, let command = Swimg.command(named: verb) else {
            return words
        }
        return try [verb] + CommandLineWords(letters: command.letters).normalized(words.dropFirst())
    }

    private func normalized(_ words: ArraySlice<String>) throws(ImageError) -> [String] {
        var result: [String] = []
        var rest = words
        while let word = rest.popFirst() {
            if word == "--" { return try result + [word] + joiningServers(rest) }
            if word == "[" {
                result.append(try server(&rest))
                continue
            }
            if word.hasPrefix("--") {
                try checkLong(word)
                result.append(word)
            } else if letters.hasSignedSize, isNegativeSize(word) {
                result.append("\(Self.signedSizeMark)\(word)")
            } else if word.hasPrefix("-"), word.count > 1 {
                try takeApart(word.dropFirst(), &rest, &result)
            } else {
                result.append(word)
            }
        }
        return result
    }

    /// Stands before a word that begins with a minus sign and is no option.
    static let signedSizeMark: Character = "="

    private func isNegativeSize(_ word: String) -> Bool {
        let behind = word.dropFirst()
        return word.hasPrefix("-") && (behind.first?.isNumber ?? false)
    }

    private func joiningServers(
        _ words: ArraySlice<String>
    ) throws(ImageError) -> [String] {
        var result: [String] = []
        var rest = words
        while let word = rest.popFirst() {
            result.append(word == "[" ? try server(&rest) : word)
        }
        return result
    }

    /// What stands behind an opening bracket, up to the closing one.
    private func server(_ rest: inout ArraySlice<String>) throws(ImageError) -> String {
        guard let end = rest.firstIndex(of: "]") else {
            throw .invalid("a server's command line has no closing ']'")
        }
        let words = Array(rest[..<end])
        rest = rest[(end + 1)...]
        guard !words.isEmpty else { throw .invalid("a server is missing in [ ]") }
        return ArgumentBytes.escaped(NBDServerCommand(words.map(ArgumentBytes.bytes)).name.bytes)
    }

    private func takeApart(
        _ word: Substring, _ rest: inout ArraySlice<String>, _ result: inout [String]
    ) throws(ImageError) {
        var word = word
        while let letter = word.popFirst() {
            if letters.missing.contains(String(letter)) { throw missing("-\(letter)") }
            result.append("-\(letter)")
            if letters.flags.contains(letter) || letter == "h" { continue }
            // An unknown letter is the parser's to refuse.
            guard letters.valued.contains(letter) else { continue }
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
        if letters.missing.contains(String(name)) { throw missing("--\(name)") }
    }

    private func missing(_ option: String) -> ImageError {
        .invalid("option '\(option)' is not supported yet")
    }
}

/// The options of one letter that a verb has, as getopt is told them.
struct OptionLetters {
    var flags: String
    var valued: String
    /// What qemu-img's verb has and ours has not yet, letters and long names.
    var missing: [String]
    /// A size may be given as a difference: `-10G` is no option then.
    var hasSignedSize: Bool

    init(
        flags: String = "", valued: String = "", missing: [String] = [],
        hasSignedSize: Bool = false
    ) {
        self.flags = flags
        self.valued = valued
        self.missing = missing
        self.hasSignedSize = hasSignedSize
    }
}
