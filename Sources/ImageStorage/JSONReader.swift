import DiskImage

/// Reads the JSON of `json:{…}` as QEMU's parser does: RFC 8259, and strings in single quotes
/// as well. It takes no comments, and no key twice.
public struct JSONReader {
    private var rest: ArraySlice<UInt8>

    /// Deeper nesting describes nothing, and each level takes some of the thread's stack.
    private static let deepest = 100

    /// - Throws: `ImageError` with what is wrong.
    public static func value(
        in text: some Sequence<UInt8>
    ) throws(ImageError) -> OptionValue {
        var reader = JSONReader(rest: Array(text)[...])
        let value = try reader.value()
        reader.skipSpace()
        guard reader.rest.isEmpty else { throw reader.problem("more follows the value") }
        return value
    }

    private func problem(_ what: String) -> ImageError {
        ImageError.invalid("is not JSON that describes an image: \(what)")
            .asQemu("Could not parse the JSON options: JSON parse error, \(what)")
    }

    private var unexpected: ImageError {
        problem(
            rest.isEmpty ? "it ends too early" : "unexpected '\(rest.prefix(20).text)'")
    }

    private mutating func skipSpace() {
        rest = rest.drop { [0x20, 0x09, 0x0a, 0x0d].contains($0) }
    }

    /// Takes a byte that has to come next, after spaces.
    private mutating func take(_ character: Unicode.Scalar) throws(ImageError) {
        guard takes(character) else { throw unexpected }
    }

    /// Takes a byte if it comes next, after spaces.
    private mutating func takes(_ character: Unicode.Scalar) -> Bool {
        skipSpace()
        guard rest.first == UInt8(ascii: character) else { return false }
        rest.removeFirst()
        return true
    }

    private mutating func value(depth: Int = 0) throws(ImageError) -> OptionValue {
        guard depth <= Self.deepest else { throw problem("it is nested too deeply") }
        skipSpace()
        guard let first = rest.first else { throw unexpected }
        switch first {
        case UInt8(ascii: "{"): return .object(try object(depth: depth + 1))
        case UInt8(ascii: "["): return .array(try array(depth: depth + 1))
        case UInt8(ascii: "\""), UInt8(ascii: "'"): return .string(try string())
        case UInt8(ascii: "a")...UInt8(ascii: "z"): return try keyword()
        default: return try number()
        }
    }

    private mutating func object(depth: Int) throws(ImageError) -> [String: OptionValue] {
        var members: [String: OptionValue] = [:]
        try take("{")
        guard !takes("}") else { return members }
        repeat {
            skipSpace()
            let key = try string().text
            guard members[key] == nil else { throw problem("duplicate key '\(key)'") }
            try take(":")
            members[key] = try value(depth: depth)
        } while takes(",")
        try take("}")
        return members
    }

    private mutating func array(depth: Int) throws(ImageError) -> [OptionValue] {
        var items: [OptionValue] = []
        try take("[")
        guard !takes("]") else { return items }
        repeat { items.append(try value(depth: depth)) } while takes(",")
        try take("]")
        return items
    }

    private mutating func keyword() throws(ImageError) -> OptionValue {
        let word = rest.prefix { (UInt8(ascii: "a")...UInt8(ascii: "z")).contains($0) }
        let known: [String: OptionValue] = [
            "null": .null, "true": .bool(true), "false": .bool(false),
        ]
        guard let value = known[word.text] else { throw unexpected }
        rest = rest[word.endIndex...]
        return value
    }

    private mutating func number() throws(ImageError) -> OptionValue {
        let start = rest
        if rest.first == UInt8(ascii: "-") { rest.removeFirst() }
        let hasZero = rest.first == UInt8(ascii: "0")
        guard takesDigits() == 1 || !hasZero else { throw unexpected }
        if rest.first == UInt8(ascii: ".") {
            rest.removeFirst()
            guard takesDigits() > 0 else { throw unexpected }
        }
        if let byte = rest.first, byte | 0x20 == UInt8(ascii: "e") {
            rest.removeFirst()
            if [UInt8(ascii: "+"), UInt8(ascii: "-")].contains(rest.first) { rest.removeFirst() }
            guard takesDigits() > 0 else { throw unexpected }
        }
        let text = start[..<rest.startIndex]
        guard text.last.map(Self.isDigit) ?? false else { throw unexpected }
        if let number = Int64(text.text) { return .integer(number) }
        let number = Double(text.text).flatMap { Int64(exactly: $0) }
        return number.map { .integer($0) } ?? .string(Array(text))
    }

    private static func isDigit(_ byte: UInt8) -> Bool {
        (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte)
    }

    /// - Returns: how many there were.
    private mutating func takesDigits() -> Int {
        let count = rest.count
        rest = rest.drop(while: Self.isDigit)
        return count - rest.count
    }

    private mutating func string() throws(ImageError) -> [UInt8] {
        guard let quote = rest.first, quote == UInt8(ascii: "\"") || quote == UInt8(ascii: "'")
        else { throw unexpected }
        rest.removeFirst()
        var bytes: [UInt8] = []
        while true {
            guard let byte = rest.popFirst() else { throw problem("it ends within a string") }
            if byte == quote { break }
            guard byte >= 0x20 else { throw problem("a control character in a string") }
            if byte == UInt8(ascii: "\\") {
                bytes += try escaped()
            } else {
                bytes.append(byte)
            }
        }
        guard String(validating: bytes, as: UTF8.self) != nil else {
            throw problem("invalid UTF-8 sequence in string")
        }
        return bytes
    }

    private static let escapes: [UInt8: UInt8] = [
        UInt8(ascii: "\""): 0x22, UInt8(ascii: "'"): 0x27, UInt8(ascii: "\\"): 0x5c,
        UInt8(ascii: "/"): 0x2f, UInt8(ascii: "b"): 0x08, UInt8(ascii: "f"): 0x0c,
        UInt8(ascii: "n"): 0x0a, UInt8(ascii: "r"): 0x0d, UInt8(ascii: "t"): 0x09,
    ]

    private mutating func escaped() throws(ImageError) -> [UInt8] {
        let byte = rest.popFirst()
        if byte == UInt8(ascii: "u") { return try unicode() }
        guard let meant = byte.flatMap({ Self.escapes[$0] }) else {
            throw problem("invalid escape sequence in string")
        }
        return [meant]
    }

    private mutating func unicode() throws(ImageError) -> [UInt8] {
        var number = try hexadecimal()
        if (0xd800...0xdbff).contains(number), rest.starts(with: "\\u".utf8) {
            rest.removeFirst(2)
            let low = try hexadecimal()
            guard (0xdc00...0xdfff).contains(low) else {
                throw problem("half a Unicode character in a string")
            }
            number = 0x10000 + (number - 0xd800) << 10 + (low - 0xdc00)
        }
        guard let scalar = Unicode.Scalar(number), !scalar.properties.isNoncharacterCodePoint else {
            throw problem("U+\(String(number, radix: 16)) is not a valid Unicode character")
        }
        return Array(String(Character(scalar)).utf8)
    }

    private mutating func hexadecimal() throws(ImageError) -> UInt32 {
        let digits = rest.prefix(4)
        guard digits.count == 4, digits.first != UInt8(ascii: "+"),
            let number = UInt32(digits.text, radix: 16)
        else { throw problem("'\\u\(digits.text)' is not a valid Unicode character") }
        rest = rest.dropFirst(4)
        return number
    }
}
