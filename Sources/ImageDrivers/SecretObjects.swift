import DiskImage
import ImageFormats
import ImageStorage

extension Secrets {
    /// Reads the objects of a command line, `secret,id=…,data=…` or the same as a JSON object.
    /// Objects of other types are of no use here, and ignored.
    ///
    /// - Throws: `ImageError`, mostly in qemu's words; none of them quotes a secret.
    public init(objects: [[UInt8]]) throws(ImageError) {
        self.init()
        for object in objects {
            var members = try Self.members(of: object)
            guard members.removeValue(forKey: "qom-type")?.text == "secret" else { continue }
            guard let id = members.removeValue(forKey: "id")?.text, !id.isEmpty else {
                throw .invalid("Parameter 'id' is missing")
            }
            try add(try Self.secret(members), id: id)
        }
    }

    private static func members(of object: [UInt8]) throws(ImageError) -> [String: [UInt8]] {
        if object.first == UInt8(ascii: "{") {
            // The reader's own message could quote a secret.
            guard let value = try? JSONReader.value(in: object), case .object(let tree) = value
            else { throw .invalid("--object is neither a JSON object nor a list of options") }
            return tree.compactMapValues { value -> [UInt8]? in
                if case .string(let text) = value { text } else { nil }
            }
        }
        var members: [String: [UInt8]] = [:]
        for (index, word) in OptionWords.split(object).enumerated() {
            if let (key, value) = OptionWords.sides(of: word) {
                members[key] = value
            } else if index == 0 {
                members["qom-type"] = word
            }
        }
        return members
    }

    private static func secret(_ members: [String: [UInt8]]) throws(ImageError) -> SecretBytes {
        if members["keyid"] != nil || members["iv"] != nil {
            throw .invalid("secrets that are encrypted themselves (keyid=) are not supported")
        }
        let known: Set<String> = ["data", "file", "format"]
        if let key = members.keys.filter({ !known.contains($0) }).min() {
            throw .invalid("Parameter '\(key)' is unexpected")
        }
        let stored: SecretBytes
        switch (members["data"], members["file"]) {
        case (_?, _?): throw .invalid("'file' and 'data' are mutually exclusive")
        case (let data?, nil): stored = SecretBytes(data)
        case (nil, let file?): stored = try SecretFile.read(HostPath(bytes: file))
        case (nil, nil): throw .invalid("Either 'file' or 'data' must be provided")
        }
        switch members["format"]?.text {
        case nil, "raw": return stored
        case "base64":
            guard let decoded = stored.base64Decoded() else {
                throw .invalid("Base64 data contains invalid characters")
            }
            return decoded
        case let format?:
            throw .invalid("Parameter 'format' does not accept value '\(format)'")
        }
    }
}

extension SecretBytes {
    /// The bytes that base64 text stands for (RFC 4648), which can have line breaks; nil for other
    /// characters, or if the text is cut short.
    func base64Decoded() -> SecretBytes? {
        withoutLineBreaks().withBytes { digits in
            let pad = UInt8(ascii: "=")
            let end = digits.firstIndex(of: pad) ?? digits.count
            guard digits.count % 4 == 0, digits.count - end <= 2,
                digits[end...].allSatisfy({ $0 == pad }),
                digits[..<end].allSatisfy({ Self.value(ofDigit: $0) != nil })
            else { return nil }
            return SecretBytes(count: end * 6 / 8) { result in
                var bits: UInt32 = 0
                for index in 0..<end {
                    bits = bits << 6 | UInt32(Self.value(ofDigit: digits[index]) ?? 0)
                    // Each digit but the first of four completes a byte.
                    guard index % 4 != 0 else { continue }
                    let spare = UInt32((index * 6 + 6) % 8)
                    result[index * 6 / 8] = UInt8(truncatingIfNeeded: bits >> spare)
                }
            }
        }
    }

    private func withoutLineBreaks() -> SecretBytes {
        let lineBreak = UInt8(ascii: "\n")
        return withBytes { text in
            SecretBytes(count: text.count { $0 != lineBreak }) { result in
                var count = 0
                for byte in text where byte != lineBreak {
                    result[count] = byte
                    count += 1
                }
            }
        }
    }

    private static func value(ofDigit digit: UInt8) -> UInt8? {
        switch digit {
        case UInt8(ascii: "A")...UInt8(ascii: "Z"): digit - UInt8(ascii: "A")
        case UInt8(ascii: "a")...UInt8(ascii: "z"): digit - UInt8(ascii: "a") + 26
        case UInt8(ascii: "0")...UInt8(ascii: "9"): digit - UInt8(ascii: "0") + 52
        case UInt8(ascii: "+"): 62
        case UInt8(ascii: "/"): 63
        default: nil
        }
    }
}
