import Foundation

/// A JSON report without the list `children`, which qemu-img prints since QEMU 8.
public func withoutChildren(_ text: String) -> String {
    var lines: [Substring] = []
    var end: String?
    for line in text.split(separator: "\n", omittingEmptySubsequences: false) {
        if let known = end {
            if line == known { end = nil }
        } else if line.hasSuffix("\"children\": [") {
            end = line.prefix { $0 == " " } + "],"
        } else {
            lines.append(line)
        }
    }
    return lines.joined(separator: "\n")
}

/// `qemu-img info` about an image itself, without the file's name and its allocated size.
public func info(_ path: String, _ format: String) throws -> NSDictionary {
    let text = try Qemu.img("info", "--output=json", "-f", format, path)
    guard
        let report = try JSONSerialization.jsonObject(with: Data(text.utf8)) as? NSDictionary,
        let result = report.mutableCopy() as? NSMutableDictionary
    else { throw CommandError(description: "not a report: \(text)") }
    result.removeObject(forKey: "filename")
    result.removeObject(forKey: "actual-size")
    return result
}

/// The message after the program's name.
public func withoutName(_ outcome: Outcome) -> String {
    let text = outcome.errorText
    guard let colon = text.range(of: ": ") else { return text }
    return String(text[colon.upperBound...])
        .replacingOccurrences(of: "\(Swimg.prefix)", with: "qemu-img: ")
}
