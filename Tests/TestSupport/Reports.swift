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
