import DiskImage

/// The name of an export: an NBD URI, or one of qemu's older forms of it.
///
/// - `nbd://host[:port]/export`, `nbds://…`, `nbd+unix:///export?socket=path`, `nbds+unix://…`
///   (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md)
/// - `nbd:host:port[:exportname=export]`, `nbd:unix:path[:exportname=export]`
public struct NBDAddress: Sendable, Equatable {
    /// In the URI form.
    public let uri: String
    /// As it was given, for messages.
    public let name: String

    private static let schemes = ["nbd://", "nbds://", "nbd+unix://", "nbds+unix://"]

    /// nil if the name is no NBD name at all.
    ///
    /// - Throws: for one that begins like an NBD name and cannot be understood.
    public init?(_ name: String) throws(ImageError) {
        guard Self.isNBD(name) else { return nil }
        self.name = name
        uri = Self.schemes.contains { name.hasPrefix($0) } ? name : try Self.uri(fromOlder: name)
    }

    /// Whether the server is on this machine, behind a unix socket.
    var isLocal: Bool { uri.hasPrefix("nbd+unix:") || uri.hasPrefix("nbds+unix:") }

    init(uri: String, name: String) {
        self.uri = uri
        self.name = name
    }

    /// Whether a name means an export, well-formed or not.
    public static func isNBD(_ name: String) -> Bool {
        name.hasPrefix("nbd:") || schemes.contains { name.hasPrefix($0) }
    }

    private static func uri(fromOlder name: String) throws(ImageError) -> String {
        var place = name.dropFirst("nbd:".count)
        var export = ""
        if let mark = place.firstRange(of: ":exportname=") {
            export = String(place[mark.upperBound...])
            place = place[..<mark.lowerBound]
        }
        if place.hasPrefix("unix:") {
            let socket = place.dropFirst("unix:".count)
            guard !socket.isEmpty else { throw invalid(name, "the path of a socket is missing") }
            return unixURI(socket: String(socket), export: export)
        }
        guard let colon = place.lastIndex(of: ":"), colon != place.startIndex,
            UInt16(place[place.index(after: colon)...]) != nil
        else { throw invalid(name, "expected is nbd:host:port or nbd:unix:path") }
        return "nbd://\(place)/" + escaped(export)
    }

    static func unixURI(socket: String, export: String) -> String {
        "nbd+unix:///\(escaped(export))?socket=\(escaped(socket))"
    }

    /// With everything but unreserved characters written as %XX (RFC 3986, section 2).
    public static func escaped(_ text: String) -> String {
        let hex = Array("0123456789ABCDEF")
        var result = ""
        for byte in text.utf8 {
            switch byte {
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "."),
                UInt8(ascii: "_"), UInt8(ascii: "~"), UInt8(ascii: "/"):
                result.unicodeScalars.append(Unicode.Scalar(byte))
            default: result += "%\(hex[Int(byte >> 4)])\(hex[Int(byte & 15)])"
            }
        }
        return result
    }

    private static func invalid(_ name: String, _ reason: String) -> ImageError {
        ImageError(.invalid, path: name, "is not the name of an NBD export: \(reason)")
    }
}
