import ArgumentParser
import DiskImage
import HTTPStorage
import ImageStorage
import NBDStorage

/// Options for connections to servers, which all verbs share.
struct ServerOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            """
            Connections to an HTTP server, or to an NBD export that allows several, 1 to 16 \
            (default: up to 16, and up to 4).
            """,
            valueName: "number"))
    var connections: String?

    @Option(
        help: ArgumentHelp(
            "Requests in flight on each NBD connection, 1 to 64 (default: as many as help).",
            valueName: "number"))
    var requests: String?

    @Option(
        name: .customLong("request-size"),
        help: ArgumentHelp(
            """
            Bytes of an NBD request, a multiple of 4096 up to 32M (default: 256k, 512k to a server \
            on this machine).
            """,
            valueName: "size"))
    var requestSize: String?

    @Option(
        help: ArgumentHelp(
            """
            Time within which a server has to answer (default: 30 for HTTP, unlimited for NBD).
            """,
            valueName: "seconds"))
    var timeout: String?

    @Option(
        help: ArgumentHelp(
            """
            Time to restore a lost NBD connection (default: the loss is an error). A source must \
            not have changed; every write to a target is made stable, which takes longer.
            """, valueName: "seconds"))
    var reconnect: String?

    @Flag(
        name: .customLong("multi-conn"),
        help: "Use several connections also where the NBD server does not announce multi-conn.")
    var multiConn = false

    @Option(
        name: .customLong("header"), parsing: .unconditionalSingleValue,
        help: ArgumentHelp(
            """
            A header line for each HTTP request; @FILE takes all lines of a file, so that no \
            secret is seen among the running programs.
            """, valueName: "line"))
    var headers: [OptionText] = []

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

    func options() throws(ImageError) -> StorageOptions {
        var options = StorageOptions()
        options.http = try httpOptions()
        options.nbd.connections = try Int.option(
            connections, "connections", NBDOptions.connectionRange)
        options.nbd.requests = try Int.option(requests, "requests", NBDOptions.requestRange)
        if let requestSize {
            guard let size = Int64(byteSize: requestSize),
                NBDOptions.requestSizeRange.contains(size), size % 4096 == 0
            else {
                throw .invalid(
                    "invalid size '\(requestSize)': --request-size takes a multiple of 4096 up to "
                        + "32M")
            }
            options.nbd.requestSize = size
        }
        options.nbd.timeout = try Int.option(timeout, "timeout", NBDOptions.timeoutRange)
        options.nbd.reconnectTime = try Int.option(
            reconnect, "reconnect", NBDOptions.reconnectRange)
        options.nbd.forcesMultiConn = multiConn
        options.http.connections = options.nbd.connections
        if let timeout = options.nbd.timeout { options.http.timeout = timeout }
        return options
    }
}

// MARK: HTTP

extension ServerOptions {
    private func httpOptions() throws(ImageError) -> HTTPOptions {
        var result = HTTPOptions()
        for header in headers.map(\.bytes) {
            if header.first == UInt8(ascii: "@") {
                result.headers += try Self.lines(of: HostPath(bytes: Array(header.dropFirst())))
            } else {
                result.headers.append(try Self.checked(header[...]))
            }
        }
        result.authorities = authorities.map { HostPath(bytes: $0.bytes) }
        result.certificate = certificate.map { HostPath(bytes: $0.bytes) }
        result.key = key.map { HostPath(bytes: $0.bytes) }
        result.socket = socket.map { HostPath(bytes: $0.bytes) }
        result.isInsecure = insecure
        result.allowsHTTP2 = allowsHTTP2
        if let retries = try Int.option(retries, "retries", HTTPOptions.retryRange) {
            result.retries = retries
        }
        return result
    }

    private static func lines(of file: HostPath) throws(ImageError) -> [String] {
        let text: [UInt8]
        do {
            text = try SecretFile.read(file).withBytes { Array($0) }
        } catch {
            throw ImageError(
                .invalid, path: file.description,
                "cannot read the header lines (--header): \(error.message)")
        }
        var lines: [String] = []
        for line in text.split(whereSeparator: {
            $0 == UInt8(ascii: "\n") || $0 == UInt8(ascii: "\r")
        }) {
            lines.append(try checked(line))
        }
        return lines
    }

    /// - Throws: `ImageError` for a line that is no header, without repeating it: it may be a
    ///   secret.
    private static func checked(_ line: ArraySlice<UInt8>) throws(ImageError) -> String {
        guard line.contains(UInt8(ascii: ":")), !line.contains(where: { $0 < 0x20 && $0 != 0x09 }),
            let text = String(validating: line, as: UTF8.self)
        else {
            throw .invalid("--header takes 'Name: value' in UTF-8, or @FILE with such lines")
        }
        return text
    }
}
