import DiskImage

/// The head of a server's answer to a GET request, without a body.
package struct HTTPAnswer: Sendable, Equatable {
    package var status = 0
    /// The server's words for the status.
    package var reason = ""
    /// The bytes that the body holds, from `Content-Range`.
    package var range: Range<Int64>?
    /// Size of the whole file in bytes, from `Content-Range`; nil if the server does not tell.
    package var total: Int64?
    /// Length of the body in bytes.
    package var length: Int64?
    var etag: String?
    var lastModified: String?
    var encoding: String?
    /// Time in seconds after which to ask again.
    package var retryAfter: Int?
    var location: String?

    /// Takes one line of a head. A status line begins a new one: an answer that redirects, or that
    /// asks for a password, comes before the one that counts.
    mutating func note(_ line: String) {
        if line.hasPrefix("HTTP/") {
            let words = line.split(separator: " ", maxSplits: 2)
            self = HTTPAnswer()
            if words.count > 1 { status = Int(words[1]) ?? 0 }
            if words.count > 2 { reason = String(words[2]) }
            return
        }
        guard let colon = line.firstIndex(of: ":") else { return }
        let value = line[line.index(after: colon)...].trimmed
        switch line[..<colon].lowercased() {
        case "content-range": noteRange(value)
        case "content-length": length = Int64(value)
        case "etag": etag = value
        case "last-modified": lastModified = value
        case "content-encoding" where value.lowercased() != "identity": encoding = value
        case "retry-after": retryAfter = Int(value)
        case "location": location = value
        default: break
        }
    }

    /// Reads `bytes 0-99/1000`, `bytes 0-99/*` or `bytes */1000` (RFC 9110, 14.4).
    private mutating func noteRange(_ value: String) {
        guard value.lowercased().hasPrefix("bytes ") else { return }
        let sides = value.dropFirst("bytes ".count).trimmed.split(separator: "/")
        guard sides.count == 2 else { return }
        total = Int64(sides[1]).flatMap { $0 >= 0 ? $0 : nil }
        let ends = sides[0].split(separator: "-", omittingEmptySubsequences: false)
            .map { Int64($0) }
        guard ends.count == 2, let first = ends[0], let last = ends[1], first >= 0, first <= last,
            last < .max
        else { return }
        range = first..<last + 1
    }

    /// The status for messages.
    package var statusText: String {
        (["\(status)", reason.withoutControlCharacters].filter { !$0.isEmpty })
            .joined(separator: " ")
    }
}

/// The marks by which one version of a file is told from another.
package struct HTTPVersion: Sendable, Equatable {
    /// Size in bytes.
    var size: Int64
    /// The entity tag; a weak one (`W/…`) does not promise equal bytes, but a change of it is one.
    var etag: String?
    var lastModified: String?

    /// The header line that makes a server refuse a range of another version: 412.
    var condition: String? {
        if let etag, !etag.hasPrefix("W/") { return "If-Match: \(etag)" }
        return lastModified.map { "If-Unmodified-Since: \($0)" }
    }

    /// Whether an answer is about another version.
    func differs(from answer: HTTPAnswer) -> Bool {
        if let total = answer.total, total != size { return true }
        if let etag { return answer.etag.map { $0 != etag } ?? false }
        guard let lastModified, let other = answer.lastModified else { return false }
        return other != lastModified
    }
}

/// The meaning of an answer's head for the request of a range.
enum HTTPVerdict: Equatable {
    /// The body holds these bytes: the first ones that were asked for, and maybe not all.
    case range(Range<Int64>)
    /// The body is the whole file, although a range was asked for; its length in bytes, if the
    /// server tells it.
    case wholeFile(Int64?)
    /// The file has no bytes.
    case empty
    /// The next attempt may succeed; the server may say after how many seconds.
    case busy(after: Int?)
    /// The address that a redirect led to may have expired.
    case forbidden
    case changed
    case error(String)

    /// - Parameters:
    ///   - wanted: the range that was asked for, in bytes; never empty.
    ///   - version: nil if nothing is known about the file yet.
    init(_ answer: HTTPAnswer, wanted: Range<Int64>, version: HTTPVersion?) {
        if let encoding = answer.encoding, answer.status < 300 {
            self = .error("the server sends it encoded (\(encoding)), although that was declined")
            return
        }
        switch answer.status {
        case 206: self = Self.part(answer, wanted, version)
        case 200: self = .wholeFile(answer.length)
        case 412: self = .changed
        case 416 where version == nil && answer.total == 0: self = .empty
        case 416 where version != nil: self = .changed
        case 401, 403, 410: self = .forbidden
        case 408, 429, 500, 502, 503, 504: self = .busy(after: answer.retryAfter)
        default: self = .error("the server answers \(answer.statusText)")
        }
    }

    private static func part(
        _ answer: HTTPAnswer, _ wanted: Range<Int64>, _ version: HTTPVersion?
    ) -> HTTPVerdict {
        guard let range = answer.range else {
            return .error("the server does not say which bytes it sends (Content-Range)")
        }
        if let version, version.differs(from: answer) { return .changed }
        guard range.lowerBound == wanted.lowerBound, range.upperBound <= wanted.upperBound else {
            return .error(
                "the server sends bytes \(range.lowerBound) to \(range.upperBound - 1) instead of "
                    + "\(wanted.lowerBound) to \(wanted.upperBound - 1)")
        }
        return .range(range)
    }
}

/// The moments at which to try again, after failures in a row.
package struct HTTPPatience {
    /// Largest number of attempts that bring nothing, after the first.
    let retries: Int
    private(set) var failures = 0

    /// Longest time in seconds that a server may ask to wait.
    static let longestWait = 300

    package init(retries: Int) { self.retries = retries }

    /// Notes that bytes came: the failures before do not count any more.
    mutating func noteProgress() { failures = 0 }

    /// Notes a failure.
    ///
    /// - Parameter asked: time in seconds that the server asked to wait.
    /// - Returns: time in milliseconds until the next attempt; nil to give up.
    package mutating func nextWait(asked: Int? = nil) -> Int? {
        guard failures < retries, asked ?? 0 <= Self.longestWait else { return nil }
        failures += 1
        // A quarter of a second, then twice as long each time, up to 16 seconds.
        let own = 250 << min(failures - 1, 6)
        return max(own, (asked ?? 0) * 1000)
    }
}

extension StringProtocol {
    /// The text without spaces, tabs and line ends around it.
    package var trimmed: String {
        let isBlank: (Character) -> Bool = { $0 == " " || $0 == "\t" || $0.isNewline }
        let rest = drop(while: isBlank)
        guard let last = rest.lastIndex(where: { !isBlank($0) }) else { return "" }
        return String(rest[...last])
    }
}
