import DiskImage

extension NBDAddress {
    /// qemu's form of the name of an export, whatever form it was given in: without %XX, and for a
    /// unix socket with no other parameter. Other names stay as they are.
    public static func qemuName(_ name: ImageName) -> String {
        guard let address = try? NBDAddress(name) else { return name.description }
        let uri = address.uri
        if uri.hasPrefix("nbd+unix://") { return qemuUnixName(uri) ?? address.name }
        guard uri.hasPrefix("nbd://") else { return address.name }
        let rest = uri.dropFirst("nbd://".count).prefix { $0 != "?" && $0 != "#" }
        let host = rest.prefix { $0 != "/" }
        let export = rest.dropFirst(host.count + 1)
        let hasPort =
            host.last != "]" && host.last != ":" && host.contains(":")
            && host.split(separator: ":").last.map { $0.allSatisfy(\.isNumber) } ?? false
        let place = "nbd://\(host)" + (hasPort ? "" : ":10809")
        return export.isEmpty ? place : "\(place)/\(unescaped(export).text)"
    }

    private static func qemuUnixName(_ uri: String) -> String? {
        let parts = uri.dropFirst("nbd+unix://".count).split(
            separator: "?", maxSplits: 1, omittingEmptySubsequences: false)
        guard parts.count == 2,
            let socket = parts[1].split(separator: "&").first(where: { $0.hasPrefix("socket=") })
        else { return nil }
        let export = unescaped(parts[0].drop { $0 != "/" }.dropFirst()).text
        return "nbd+unix://\(export.isEmpty ? "" : "/\(export)")?"
            + unescaped(socket).text
    }

    /// Decodes %XX (RFC 3986, section 2.1).
    static func unescaped(_ text: Substring) -> [UInt8] {
        var bytes: [UInt8] = []
        var rest = text.utf8
        while let byte = rest.popFirst() {
            if byte == UInt8(ascii: "%"), let value = UInt8(String(rest.prefix(2)) ?? "", radix: 16)
            {
                bytes.append(value)
                rest = rest.dropFirst(2)
            } else {
                bytes.append(byte)
            }
        }
        return bytes
    }
}
