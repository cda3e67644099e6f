import DiskImage

/// The address of a disk that an ovirt-imageio daemon serves.
struct ImageioAddress: Sendable, Equatable {
    /// The URL of the disk, in HTTP's form. It ends with the ticket, which is the password.
    var url: String
    /// Path of the daemon's socket, instead of the host.
    var socket: HostPath?
    /// The address for messages, without the ticket.
    var label: String

    private static let defaultPort = 54322
    private static let schemes = [
        "imageio://": "https://", "imageio+http://": "http://", "imageio+unix://": "http://",
    ]

    static func isImageio(_ name: ImageName) -> Bool {
        schemes.keys.contains { name.bytes.starts(with: Array($0.utf8)) }
    }

    /// - Throws: `ImageError` for a name that is no such address.
    init(_ name: ImageName) throws(ImageError) {
        let text = name.bytes.text
        guard let (scheme, http) = Self.schemes.first(where: { text.hasPrefix($0.key) }),
            let slash = text.dropFirst(scheme.count).firstIndex(of: "/")
        else { throw Self.malformed }
        var host = String(text[text.index(text.startIndex, offsetBy: scheme.count)..<slash])
        var path = text[slash...]
        if let question = path.firstIndex(of: "?") {
            let option = path[path.index(after: question)...]
            path = path[..<question]
            guard scheme == "imageio+unix://", option.hasPrefix("socket=") else {
                throw Self.malformed
            }
            socket = HostPath(String(option.dropFirst("socket=".count)))
        }
        guard path.hasPrefix("/images/"), path.count > "/images/".count,
            host.isEmpty == (socket != nil),
            !path.utf8.contains(where: { $0 <= 0x20 || $0 == 0x7f || $0 == 0x23 })
        else { throw Self.malformed }
        label = "\(scheme)\(socket.map { "\($0)" } ?? host)/images/…"
        if socket != nil {
            host = "localhost"
        } else if host.hasSuffix("]") || !host.contains(":") {
            host += ":\(Self.defaultPort)"
        }
        url = http + host + path
    }

    private static let malformed = ImageError.invalid(
        "a disk of ovirt-imageio is named imageio://HOST:PORT/images/TICKET, imageio+http://… or "
            + "imageio+unix:///images/TICKET?socket=PATH")

    /// A text of the server, without the ticket.
    func redacted(_ text: String) -> String {
        guard let ticket = url.split(separator: "/").last else { return text }
        return text.split(separator: ticket, omittingEmptySubsequences: false)
            .joined(separator: "…")
    }
}
