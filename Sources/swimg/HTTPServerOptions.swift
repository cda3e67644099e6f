import ArgumentParser
import DiskImage
import FoundationEssentials
import HTTPStorage

/// Options for HTTP servers, which all verbs share.
struct HTTPServerOptions: ParsableArguments {
    @Option(
        name: .customLong("header"), parsing: .unconditionalSingleValue,
        help: ArgumentHelp(
            """
            A header line for each HTTP request; @FILE takes all lines of a file, so that no \
            secret is seen among the running programs.
            """, valueName: "line"))
    var headers: [String] = []

    @Option(
        name: .customLong("cacert"),
        help: ArgumentHelp(
            "Certificates of the authorities that HTTPS servers are trusted by.",
            valueName: "file"))
    var authorities: OptionText?

    @Option(
        name: .customLong("cert"),
        help: ArgumentHelp("The client's certificate for HTTPS.", valueName: "file"))
    var certificate: OptionText?

    @Option(
        name: .customLong("key"),
        help: ArgumentHelp(
            "The key of --cert, if it is in another file.", valueName: "file"))
    var key: OptionText?

    @Flag(help: "Trust HTTPS servers whatever their certificate says.")
    var insecure = false

    @Option(
        name: .customLong("unix-socket"),
        help: ArgumentHelp(
            "Socket of the HTTP server, whatever host the address names.", valueName: "path"))
    var socket: OptionText?

    @Flag(name: .customLong("http2"), help: "Use HTTP/2 if the server offers it.")
    var allowsHTTP2 = false

    @Option(
        help: ArgumentHelp(
            "Attempts to read on from an HTTP server after failures, 0 to 100 (default: 6).",
            valueName: "number"))
    var retries: String?

    func options() throws(ImageError) -> HTTPOptions {
        var result = HTTPOptions()
        for header in headers {
            if header.hasPrefix("@") {
                result.headers += try Self.lines(ofFile: String(header.dropFirst()))
            } else {
                result.headers.append(try Self.checked(header))
            }
        }
        result.authorities = authorities.map { HostPath(bytes: $0.bytes) }
        result.certificate = certificate.map { HostPath(bytes: $0.bytes) }
        result.key = key.map { HostPath(bytes: $0.bytes) }
        result.socket = socket.map { HostPath(bytes: $0.bytes) }
        result.isInsecure = insecure
        result.allowsHTTP2 = allowsHTTP2
        if let retries = try optionNumber(retries, "retries", HTTPOptions.retryRange) {
            result.retries = retries
        }
        return result
    }

    private static func lines(ofFile path: String) throws(ImageError) -> [String] {
        let text: String
        do {
            text = try String(contentsOfFile: path, encoding: .utf8)
        } catch {
            throw ImageError(.invalid, path: path, "cannot read the header lines (--header)")
        }
        var lines: [String] = []
        for line in text.split(whereSeparator: \.isNewline) { lines.append(try checked(line)) }
        return lines
    }

    /// - Throws: `ImageError` for a line that is no header, without repeating it: it may be a
    ///   secret.
    private static func checked(_ line: some StringProtocol) throws(ImageError) -> String {
        guard line.contains(":"), !line.utf8.contains(where: { $0 < 0x20 && $0 != 0x09 }) else {
            throw .invalid("--header takes 'Name: value', or @FILE with such lines")
        }
        return String(line)
    }
}
