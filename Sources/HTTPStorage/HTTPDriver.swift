import DiskImage
import ImageStorage

/// The driver of files on HTTP servers, which can only be read.
public struct HTTPDriver: StorageDriver {
    public let label = "HTTP"
    public let names = ["http", "https"]

    public init() {}

    public func claims(_ name: ImageName, isTyped: Bool) -> Bool {
        HTTPAddress.isHTTP(name, isTyped: isTyped)
    }

    public func check(_ name: ImageName) throws(ImageError) { _ = try HTTPAddress(name) }

    public func name(
        from options: inout DescribedOptions, prefix: String
    ) throws(ImageError) -> ImageName {
        guard let url = try options.bytes(prefix + "url") else {
            throw options.invalid("an HTTP file needs a 'url'")
        }
        let name = ImageName(bytes: url)
        guard HTTPAddress.isHTTP(name, isTyped: true) else {
            throw options.invalid("'url' must begin with http:// or https://")
        }
        var address = try HTTPAddress(name)
        if let user = try options.text(prefix + "username") { address.credentials = user + ":" }
        address.cookie = try options.text(prefix + "cookie")
        address.timeout = try options.size(prefix + "timeout").map { Int($0) }
        address.isInsecure =
            [.bool(false), .string(Array("off".utf8))].contains(options.take(prefix + "sslverify"))
        _ = options.take(prefix + "readahead")
        return address.name
    }

    public func shownName(_ name: ImageName) -> String {
        (try? HTTPAddress(name))?.url ?? name.description
    }

    public func name(of path: HostPath, in image: ImageName) -> ImageName? {
        (try? HTTPAddress(image))?.resolving(path).map { ImageName($0) }
    }

    public func openSource(
        _ name: ImageName, _ access: StorageAccess
    ) throws(ImageError) -> any Storage {
        try HTTPStorage.open(HTTPAddress(name), access.options.http)
    }

    public func beginTarget(
        _ name: ImageName, _ request: TargetRequest
    ) throws(ImageError) -> any StorageTarget {
        throw .unsupported(
            try HTTPAddress(name).label, "files on HTTP servers can only be read")
    }
}
