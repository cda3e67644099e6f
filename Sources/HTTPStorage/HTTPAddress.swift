import DiskImage

/// The address of a file on an HTTP server, and what a description of the image adds to it.
package struct HTTPAddress: Sendable, Equatable {
    /// The URL without user and password.
    package var url: String
    /// `user:password`, as they stood in the URL.
    var credentials: String?
    var cookie: String?
    var timeout: Int?
    var isInsecure = false

    private static let schemes = ["http://", "https://"]

    /// Whether a name is a URL of HTTP.
    ///
    /// - Parameter isTyped: whether a person typed it. A name in an image may hold no password, and
    ///   no options.
    static func isHTTP(_ name: ImageName, isTyped: Bool) -> Bool {
        let start = name.bytes.prefix(8).text.lowercased()
        guard schemes.contains(where: { start.hasPrefix($0) }) else { return false }
        return isTyped || !name.isMarked && userEnd(name.bytes.text) == nil
    }

    /// - Throws: `ImageError` for a name without a host, or with control characters.
    package init(_ name: ImageName) throws(ImageError) {
        let parts = name.bytes.split(separator: ImageName.mark)
        let text = (parts.first ?? []).text
        url = text
        if let userEnd = Self.userEnd(text), let start = Self.hostStart(text) {
            credentials = Self.unescaped(text[start..<userEnd])
            url = String(text[..<start] + text[text.index(after: userEnd)...])
        }
        for part in parts.dropFirst() {
            let word = part.text
            let (key, value) = (word.prefix(2), String(word.dropFirst(2)))
            switch key {
            case "u=": credentials = value
            case "c=": cookie = value
            case "t=": timeout = Int(value)
            default: isInsecure = true
            }
        }
        guard let start = Self.hostStart(url), start < url.endIndex, url[start] != "/",
            !url.utf8.contains(where: { $0 <= 0x20 || $0 == 0x7f })
        else { throw .invalid("'\(label)' is not the address of a file") }
    }

    /// The name that `init` turns into this address.
    var name: ImageName {
        var bytes = Array(url.utf8)
        let words = [
            credentials.map { "u=" + $0 }, cookie.map { "c=" + $0 }, timeout.map { "t=\($0)" },
            isInsecure ? "insecure" : nil,
        ]
        for word in words.compactMap({ $0 }) { bytes += [ImageName.mark] + Array(word.utf8) }
        return ImageName(bytes: bytes)
    }

    /// The address for messages: without the query, which often is a signature that lets everyone
    /// read the file.
    var label: String { url.firstIndex(of: "?").map { url[..<$0] + "?…" } ?? url }

    /// The scheme, host and port, which decide who may get passwords.
    static func origin(_ url: String) -> String {
        guard let start = hostStart(url) else { return url }
        return url[..<hostEnd(url, start)].lowercased()
    }

    /// The address of a path that stands in a file of this address.
    func resolving(_ path: HostPath) -> String? {
        let reference = path.description
        guard let start = Self.hostStart(url) else { return nil }
        let hostEnd = Self.hostEnd(url, start)
        if path.isAbsolute { return url[..<hostEnd] + reference }
        let pathEnd = url[hostEnd...].firstIndex { $0 == "?" || $0 == "#" } ?? url.endIndex
        guard let slash = url[hostEnd..<pathEnd].lastIndex(of: "/") else {
            return url[..<hostEnd] + "/" + reference
        }
        return url[...slash] + reference
    }

    private static func hostStart(_ url: String) -> String.Index? {
        schemes.first { url.lowercased().hasPrefix($0) }
            .map { url.index(url.startIndex, offsetBy: $0.count) }
    }

    private static func hostEnd(_ url: String, _ start: String.Index) -> String.Index {
        url[start...].firstIndex { "/?#".contains($0) } ?? url.endIndex
    }

    /// The place of the `@` behind user and password.
    private static func userEnd(_ url: String) -> String.Index? {
        guard let start = hostStart(url) else { return nil }
        return url[start..<hostEnd(url, start)].lastIndex(of: "@")
    }

    /// Replaces `%41` and the like.
    private static func unescaped(_ text: Substring) -> String {
        var bytes: [UInt8] = []
        var rest = Array(text.utf8)[...]
        while let byte = rest.popFirst() {
            if byte == UInt8(ascii: "%"), rest.count >= 2,
                let value = UInt8(rest.prefix(2).text, radix: 16)
            {
                bytes.append(value)
                rest.removeFirst(2)
            } else {
                bytes.append(byte)
            }
        }
        return bytes.text
    }
}
