import DiskImage

/// The name of an export: an NBD URI, or one of qemu's older forms.
///
/// - `nbd://host[:port]/export` (to qemu also `nbd+tcp://…`), `nbds://…`,
///   `nbd+unix:///export?socket=path`, `nbds+unix://…`
///   (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md)
/// - `nbd:host:port[:exportname=export]`, `nbd:unix:path[:exportname=export]`
public struct NBDAddress: Sendable, Equatable {
    /// The name in the URI form, which is ASCII.
    public let uri: String
    /// The name as it was given, for messages.
    public let name: String
    /// The metadata context that `map` shows instead of the usual one (qemu's `x-dirty-bitmap`);
    /// nil is the usual one.
    let context: String?

    /// The parameter of the URI that names the context. It is not one of the NBD URI's.
    static let contextParameter = "x-dirty-bitmap"
    private static let schemes = ["nbd", tcpScheme, "nbd+unix"] + secureSchemes
    private static let secureSchemes = ["nbds", "nbds+unix"]
    /// qemu's other scheme for `nbd`, which libnbd does not know.
    private static let tcpScheme = "nbd+tcp"
    private static let olderPrefix = Array("nbd:".utf8)

    /// Parses a name; nil if it is not an NBD name.
    ///
    /// - Throws: `ImageError` for a name that begins like an NBD name and cannot be parsed.
    public init?(_ name: ImageName) throws(ImageError) {
        guard Self.isNBD(name) else { return nil }
        self.name = name.description
        let whole =
            if name.protocolName == Self.tcpScheme {
                "nbd" + Self.escapedURI(name.bytes.dropFirst(Self.tcpScheme.utf8.count))
            } else {
                Self.isURI(name) ? Self.escapedURI(name.bytes) : try Self.uri(fromOlder: name)
            }
        (uri, context) = Self.takingContext(whole)
    }

    /// The URI without the parameter for the context, and the context.
    private static func takingContext(_ uri: String) -> (uri: String, context: String?) {
        guard let value = parameter(contextParameter, of: uri),
            let mark = uri.firstIndex(of: "?")
        else { return (uri, nil) }
        let others = uri[mark...].dropFirst().split(separator: "&").filter {
            !$0.hasPrefix("\(contextParameter)=")
        }
        return (
            uri[..<mark] + (others.isEmpty ? "" : "?" + others.joined(separator: "&")), value.text
        )
    }

    /// Whether the server is behind a unix socket.
    var isUnixSocket: Bool { uri.hasPrefix("nbd+unix:") || uri.hasPrefix("nbds+unix:") }

    /// Whether the connection is encrypted.
    var isSecure: Bool { Self.secureSchemes.contains { uri.hasPrefix("\($0):") } }

    /// The value of a parameter in the URI (`?name=value&…`), the last one as in libnbd; nil if
    /// there is none.
    func parameter(_ name: String) -> [UInt8]? { Self.parameter(name, of: uri) }

    private static func parameter(_ name: String, of uri: String) -> [UInt8]? {
        guard let mark = uri.firstIndex(of: "?") else { return nil }
        let query = uri[mark...].dropFirst().prefix { $0 != "#" }
        return query.split { $0 == "&" || $0 == ";" }
            .last { $0.hasPrefix("\(name)=") }
            .map { unescaped($0.dropFirst(name.utf8.count + 1)) }
    }

    init(uri: String, name: String) {
        self.uri = uri
        self.name = name
        context = nil
    }

    /// Whether a name means an NBD export, well-formed or not.
    public static func isNBD(_ name: ImageName) -> Bool {
        name.bytes.starts(with: olderPrefix) || isURI(name)
    }

    /// Whether a name means an NBD export without encryption.
    public static func isPlain(_ name: ImageName) -> Bool {
        isNBD(name) && name.protocolName.map(secureSchemes.contains) != true
    }

    private static func isURI(_ name: ImageName) -> Bool {
        guard let scheme = name.protocolName, schemes.contains(scheme) else { return false }
        return name.bytes.dropFirst(scheme.utf8.count).starts(withASCII: "://")
    }

    private static func uri(fromOlder name: ImageName) throws(ImageError) -> String {
        var place = name.bytes[olderPrefix.count...]
        var export: ArraySlice<UInt8> = []
        let mark = Array(":exportname=".utf8)
        if let start = place.indices.first(where: { place[$0...].starts(with: mark) }) {
            export = place[(start + mark.count)...]
            place = place[..<start]
        }
        if let socket = place.dropping(prefix: Array("unix:".utf8)) {
            guard !socket.isEmpty else { throw invalid(name, "the path of the socket is missing") }
            return unixURI(socket: socket, export: export)
        }
        guard let colon = place.lastIndex(of: UInt8(ascii: ":")), colon != place.startIndex,
            UInt16(place[(colon + 1)...].text) != nil
        else { throw invalid(name, "expected nbd:host:port or nbd:unix:path") }
        return "nbd://\(escapedURI(place))/" + escaped(export)
    }

    public static func unixURI(
        socket: some Collection<UInt8>, export: some Collection<UInt8>
    ) -> String {
        "nbd+unix:///\(escaped(export))?socket=\(escaped(socket))"
    }

    /// The bytes with %XX for all but unreserved characters and slashes (RFC 3986, section 2).
    public static func escaped(_ bytes: some Collection<UInt8>) -> String {
        escaped(bytes) { byte in
            switch byte {
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "."),
                UInt8(ascii: "_"), UInt8(ascii: "~"), UInt8(ascii: "/"):
                true
            default: false
            }
        }
    }

    /// A URI as it was typed, with %XX for bytes that are not ASCII.
    private static func escapedURI(_ bytes: some Collection<UInt8>) -> String {
        escaped(bytes) { $0 < 0x80 }
    }

    private static func escaped(
        _ bytes: some Collection<UInt8>, where isKept: (UInt8) -> Bool
    ) -> String {
        let hex = Array("0123456789ABCDEF")
        var result = ""
        for byte in bytes {
            if isKept(byte) {
                result.unicodeScalars.append(Unicode.Scalar(byte))
            } else {
                result += "%\(hex[Int(byte >> 4)])\(hex[Int(byte & 15)])"
            }
        }
        return result
    }

    private static func invalid(_ name: ImageName, _ reason: String) -> ImageError {
        ImageError(
            .invalid, path: name.description, "is not the name of an NBD export: \(reason)")
    }
}
