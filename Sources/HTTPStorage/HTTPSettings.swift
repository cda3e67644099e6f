import CCurl
import DiskImage
import Glibc

/// The settings that requests have in common, in libcurl's form.
package final class HTTPSettings: @unchecked Sendable {
    // Nothing changes after `init`.
    private(set) var values = ccurl_settings()
    /// The header lines.
    let lines: [String]
    private var strings: [UnsafeMutablePointer<CChar>] = []

    /// Number of redirects from one address to another that are followed.
    private static let redirects = 10

    /// - Parameters:
    ///   - version: asked for in each request, if it is known.
    ///   - isOrigin: whether requests go to the server that the user named. Another one that a
    ///     redirect leads to gets no passwords.
    package init(
        _ options: HTTPOptions, _ address: HTTPAddress? = nil, version: HTTPVersion? = nil,
        isOrigin: Bool = true
    ) {
        // Encoded bytes would have other offsets than the file's. A server need not be asked
        // whether it wants a body.
        lines =
            ["Accept-Encoding: identity", "User-Agent: swimg", "Expect:"]
            + [version?.condition].compactMap { $0 }
            + options.headers.filter { isOrigin || !Self.isSecret($0) }
        values.credentials = isOrigin ? copy(address?.credentials?.utf8) : nil
        values.cookie = isOrigin ? copy(address?.cookie?.utf8) : nil
        values.authorities = copy(options.authorities?.bytes)
        values.certificate = copy(options.certificate?.bytes)
        values.key = copy(options.key?.bytes)
        if let socket = options.socket {
            // A name that begins with a zero byte is in the abstract namespace.
            if socket.bytes.first == 0 {
                values.abstract_socket = copy(socket.bytes.dropFirst())
            } else {
                values.socket = copy(socket.bytes)
            }
        }
        values.timeout = address?.timeout ?? options.timeout
        values.is_insecure = options.isInsecure || address?.isInsecure ?? false
        values.allows_http2 = options.allowsHTTP2
        values.redirects = Self.redirects
        for line in lines { values.headers = ccurl_add_header(values.headers, line) }
    }

    deinit {
        ccurl_free_headers(values.headers)
        for string in strings { free(string) }
    }

    /// Whether a header line may only go to the server it is meant for. curl draws the same line.
    private static func isSecret(_ line: String) -> Bool {
        let name = line.prefix { $0 != ":" }.lowercased()
        return name == "authorization" || name == "cookie"
    }

    private func copy(_ bytes: (some Collection<UInt8>)?) -> UnsafePointer<CChar>? {
        guard let bytes, let string = Array(bytes).withCString({ strdup($0) }) else { return nil }
        strings.append(string)
        return UnsafePointer(string)
    }
}
