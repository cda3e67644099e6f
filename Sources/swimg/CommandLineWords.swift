import ArgumentParser
import DiskImage
import FoundationEssentials
import NBDStorage

/// Converts qemu-img's command lines into the form that the argument parser reads.
///
/// qemu-img uses getopt, which accepts `-pn`, `-m8`, `-pOqcow2` and options after the paths. The
/// parser does not understand every joined form, so joined options are split first. A server's
/// command line in brackets, in nbdcopy's syntax, becomes one word. All words are in the form of
/// `ArgumentBytes`, so each character is one byte.
struct CommandLineWords {
    private let command: any ImageCommand.Type
    /// The letters of the options that take a value. Only in its help does the parser tell them,
    /// and making that takes as long as parsing a command line, so few command lines ask for them.
    private lazy var valuedLetters = command.valuedLetters

    private init(_ command: any ImageCommand.Type) { self.command = command }

    /// The words after the program's name, in the parser's form.
    static func normalized(_ words: [String]) throws(ImageError) -> [String] {
        guard let verb = words.first, let command = Swimg.command(named: verb) else {
            return words
        }
        var parts = CommandLineWords(command)
        // Words that would stay as they are do so as values of options, too.
        guard words.dropFirst().contains(where: parts.isRewritten) else { return words }
        return try [verb] + parts.normalized(words.dropFirst())
    }

    /// Whether a word is changed or refused, unless it is the value of an option or comes after
    /// `--`.
    private func isRewritten(_ word: String) -> Bool {
        guard word.hasPrefix("-") else { return word == "[" }
        if word.hasPrefix("--") { return isUnsupported(Self.longName(word)) }
        let letters = word.dropFirst()
        return letters.count > 1 || isUnsupported(letters) || isSignedSize(word)
    }

    private mutating func normalized(_ words: ArraySlice<String>) throws(ImageError) -> [String] {
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
            } else if isSignedSize(word) {
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

    private mutating func takeApart(
        _ word: Substring, _ rest: inout ArraySlice<String>, _ result: inout [String]
    ) throws(ImageError) {
        var word = word
        while let letter = word.popFirst() {
            if isUnsupported("\(letter)") { throw unsupported("-\(letter)") }
            result.append("-\(letter)")
            // A flag, or unknown, which the parser reports.
            guard valuedLetters.contains(letter) else { continue }
            if !word.isEmpty {
                result.append(String(word))
            } else if let value = rest.popFirst() {
                result.append(value)
            }
            return
        }
    }

    /// An error in the words on the command line, with qemu-img's pointer to its help.
    static func mistake(_ message: String) -> ImageError {
        ImageError.invalid(message).asQemu(message, hint: QemuImgHelp.pointer)
    }

    private func isSignedSize(_ word: String) -> Bool {
        command.hasSignedSize && word.dropFirst().first?.isNumber ?? false
    }

    private func checkLong(_ word: String) throws(ImageError) {
        let name = Self.longName(word)
        if isUnsupported(name) { throw unsupported("--\(name)") }
    }

    private static func longName(_ word: String) -> Substring {
        word.dropFirst(2).prefix { $0 != "=" }
    }

    private func isUnsupported(_ option: Substring) -> Bool {
        command.unsupportedOptions.contains { $0 == option }
    }

    private func unsupported(_ option: String) -> ImageError {
        .invalid("option '\(option)' is not supported yet")
    }
}

extension ParsableCommand {
    /// The letters of the options that take a value, as they are declared.
    fileprivate static var valuedLetters: Set<Character> {
        guard let help = try? JSONDecoder().decode(DumpedHelp.self, from: Data(_dumpHelp().utf8))
        else { preconditionFailure("the argument parser describes its options in another way") }
        let valued = help.command.arguments.filter { $0.kind == "option" }
        let names = valued.flatMap { $0.names ?? [] }.filter { $0.kind == "short" }
        return Set(names.compactMap(\.name.first))
    }
}

/// The parts of the argument parser's description of a command that are read here.
private struct DumpedHelp: Decodable {
    struct Command: Decodable {
        let arguments: [Argument]
    }
    struct Argument: Decodable {
        let kind: String
        /// nil for arguments that have a position only.
        let names: [Name]?
    }
    struct Name: Decodable {
        let kind: String
        let name: String
    }

    let command: Command
}
