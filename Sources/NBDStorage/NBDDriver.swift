import DiskImage
import ImageStorage

/// The driver of NBD exports, and of servers that are started for a conversion.
public struct NBDDriver: StorageDriver {
    public let label = "NBD"
    public let names = ["nbd"]

    public init() {}

    /// Only plain exports may stand in images. To start programs, and to choose keys and
    /// certificates, a person has to type the name.
    public func claims(_ name: ImageName, isTyped: Bool) -> Bool {
        isTyped ? NBDStorage.isName(name) : NBDAddress.isPlain(name)
    }

    public func name(
        from options: inout DescribedOptions, prefix: String
    ) throws(ImageError) -> ImageName {
        let export = try options.bytes(prefix + "export") ?? []
        let context = try options.bytes(prefix + NBDAddress.contextParameter).map {
            "\(NBDAddress.contextParameter)=\(NBDAddress.escaped($0))"
        }
        let type = try options.text(prefix + "server.type")
        func either(_ key: String) throws(ImageError) -> [UInt8]? {
            if let value = try options.bytes(prefix + "server." + key) { return value }
            return try options.bytes(prefix + key)
        }
        if let path = try either("path") {
            guard type == nil || type == "unix" else {
                throw options.invalid("'server.type' must be 'unix' for the path of a socket")
            }
            let abstract = options.take(prefix + "server.abstract")
            guard [nil, .bool(false), .string(Array("off".utf8))].contains(abstract) else {
                throw options.invalid("sockets in the abstract namespace are not supported")
            }
            let uri = NBDAddress.unixURI(socket: path, export: export)
            return ImageName(uri + (context.map { "&" + $0 } ?? ""))
        }
        guard type == nil || type == "inet", let host = try either("host")?.text else {
            throw options.invalid("an NBD server needs a host, or the path of a socket")
        }
        let port = try either("port")?.text ?? "10809"
        let place = host.utf8.contains(UInt8(ascii: ":")) ? "[\(host)]" : host
        return ImageName(
            "nbd://\(place):\(port)/\(NBDAddress.escaped(export))"
                + (context.map { "?" + $0 } ?? ""))
    }

    public func shownName(_ name: ImageName) -> String { NBDAddress.qemuName(name) }

    public func openSource(
        _ name: ImageName, _ access: StorageAccess
    ) throws(ImageError) -> any Storage {
        try NBDStorage.open(name, access.options.nbd)
    }

    public func beginTarget(
        _ name: ImageName, _ request: TargetRequest
    ) throws(ImageError) -> any StorageTarget {
        guard request.isCopyInPlace || !request.sourceNames.contains(name) else {
            throw .invalid("the target '\(name)' is also the source")
        }
        var options = request.access.options.nbd
        options.writesThrough = request.access.cacheMode.isSynchronous
        return TargetInPlace(try NBDStorage.open(name, options, forWriting: true))
    }
}

extension StorageOptions {
    /// The options for NBD servers.
    public var nbd: NBDOptions {
        get { self[NBDOptions.self] ?? NBDOptions() }
        set { self[NBDOptions.self] = newValue }
    }
}
