import DiskImage
import NBDStorage

/// Brings qemu-img's command lines into the form that the argument parser reads.
///
/// qemu-img uses getopt: `-pn`, `-m8`, `-pOqcow2` and options behind the paths are all allowed there.
/// The parser knows none of the joined forms together, so they are taken apart first. And a server's
/// command line in brackets, as nbdcopy has it, becomes one word.
enum CommandLineWords {
    private static let flags: Set<Character> = ["c", "C", "n", "p", "q", "U", "W", "h"]
    private static let valued: Set<Character> = ["f", "O", "m", "S", "o", "t", "T", "B", "F"]
    /// What qemu-img's `convert` can do and this one cannot yet.
    private static let missingShort: Set<Character> = ["l", "r", "s"]
    private static let missingLong: Set<String> = [
        "bitmaps", "image-opts", "object", "salvage", "skip-broken-bitmaps", "target-image-opts",
    ]

    static func normalized(_ words: [String]) throws(ImageError) -> [String] {
        if words == ["-V"] { return ["--version"] }
        guard words.first == "convert" else { return words }
        var result: [String] = ["convert"]
        var rest = words.dropFirst()
        while let word = rest.popFirst() {
            if word == "--" { return try result + [word] + joiningServers(rest) }
            if word == "[" {
                result.append(try server(&rest))
                continue
            }
            if word.hasPrefix("--") {
                try checkLong(word)
                result.append(word)
            } else if word.hasPrefix("-"), word.count > 1 {
                try takeApart(word.dropFirst(), &rest, &result)
            } else {
                result.append(word)
            }
        }
        return result
    }

    private static func joiningServers(
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
    private static func server(_ rest: inout ArraySlice<String>) throws(ImageError) -> String {
        guard let end = rest.firstIndex(of: "]") else {
            throw .invalid("a server's command line has no closing ']'")
        }
        let words = Array(rest[..<end])
        rest = rest[(end + 1)...]
        guard !words.isEmpty else { throw .invalid("a server is missing in [ ]") }
        return NBDServerCommand(words).name
    }

    private static func takeApart(
        _ letters: Substring, _ rest: inout ArraySlice<String>, _ result: inout [String]
    ) throws(ImageError) {
        var letters = letters
        while let letter = letters.popFirst() {
            if missingShort.contains(letter) { throw missing("-\(letter)") }
            result.append("-\(letter)")
            if flags.contains(letter) { continue }
            // An unknown letter is the parser's to refuse.
            guard valued.contains(letter) else { continue }
            if !letters.isEmpty {
                result.append(String(letters))
            } else if let value = rest.popFirst() {
                result.append(value)
            }
            return
        }
    }

    private static func checkLong(_ word: String) throws(ImageError) {
        let name = word.dropFirst(2).prefix { $0 != "=" }
        if missingLong.contains(String(name)) { throw missing("--\(name)") }
    }

    private static func missing(_ option: String) -> ImageError {
        .invalid("option '\(option)' is not supported yet")
    }
}
