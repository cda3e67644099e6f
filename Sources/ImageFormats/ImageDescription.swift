import DiskImage
import FoundationEssentials
import ImageStorage
import NBDStorage

/// An image described by options instead of a name: qemu's `json:{…}` and `--image-opts`.
///
/// What is understood: the formats `raw` (with `offset` and `size`: a disk inside an archive) and `qcow2` (with
/// `backing` null), on `file`, `host_device` and `nbd`. Options that only tune qemu are passed over, any other
/// one is refused: it may change what the image holds.
public struct ImageDescription: Sendable, Equatable {
    /// A part of a file.
    struct Window: Sendable, Equatable {
        var offset: Int64
        /// In bytes; nil reaches to the end.
        var size: Int64?
    }

    /// nil has to be found out.
    public private(set) var format: ImageFormat?
    /// Where the bytes are: the path of a file or the name of an export.
    public private(set) var place: ImageName = ""
    /// The backing file that the image names is not to be used.
    public private(set) var ignoresBacking = false
    private(set) var windows: [Window] = []

    /// All of what is at the place.
    public var isWhole: Bool { windows.isEmpty }

    private static let jsonPrefix = Array("json:".utf8)
    /// Ends with a byte that no keyboard types: nothing but `name(fromOptions:)` makes such a name.
    private static let optionsPrefix = Array("image-opts:\u{1F}".utf8)

    /// The name that stands for the options of `--image-opts`: `key=value,…`.
    public static func name(fromOptions text: [UInt8]) -> ImageName {
        ImageName(bytes: optionsPrefix + text)
    }

    /// Whether a name is for `init(_:)`, and could stand in an image.
    static func isJSON(_ name: ImageName) -> Bool { name.bytes.starts(with: jsonPrefix) }

    /// nil if the name is no description.
    ///
    /// - Throws: `ImageError` for one that cannot be understood, or asks for what there is not.
    public init?(_ name: ImageName) throws(ImageError) {
        let options: [String: OptionTree]
        let text: [UInt8]
        if let list = name.bytes.dropping(prefix: Self.optionsPrefix) {
            text = Array(list)
            options = try Self.options(inList: text)
        } else if let json = name.bytes.dropping(prefix: Self.jsonPrefix) {
            text = name.bytes
            options = try Self.options(inJSON: json, name)
        } else {
            return nil
        }
        var parser = Parser(name: text.text, options: options)
        try parser.readFormat(into: &self)
        try parser.refuseRest()
    }

    private static func options(
        inList text: [UInt8]
    ) throws(ImageError) -> [String: OptionTree] {
        var options: [String: OptionTree] = [:]
        for word in OptionWords.split(text) where !word.isEmpty {
            guard let (key, value) = OptionWords.sides(of: word) else {
                throw .invalid("expected 'key=value' in image options, got '\(word.text)'")
            }
            options[key] = .string(value)
        }
        return options
    }

    private static func options(
        inJSON text: ArraySlice<UInt8>, _ name: ImageName
    ) throws(ImageError) -> [String: OptionTree] {
        do {
            let tree = try JSONDecoder().decode([String: OptionTree].self, from: Data(text))
            var options: [String: OptionTree] = [:]
            OptionTree.object(tree).flatten(into: &options, key: "")
            return options
        } catch {
            throw ImageError(
                .invalid, path: name.description, "is not a JSON object that describes an image")
        }
    }

    private init() {}

    /// Takes what it understands out of the options.
    private struct Parser {
        let name: String
        var options: [String: OptionTree]

        /// What changes nothing about the bytes that are read.
        private static let tuning: Set<String> = [
            "aio", "auto-read-only", "cache-clean-interval", "cache-size", "cache.direct",
            "cache.no-flush", "cache.writeback", "detect-zeroes", "discard", "drop-cache",
            "force-share", "l2-cache-entry-size", "l2-cache-size", "lazy-refcounts", "locking",
            "node-name", "open-timeout", "overlap-check", "pass-discard-other",
            "pass-discard-request", "pass-discard-snapshot", "pr-manager", "read-only",
            "reconnect-delay", "refcount-cache-size", "server.ipv4", "server.ipv6",
            "server.keep-alive", "server.mptcp", "server.numeric", "server.tight", "server.to",
            "x-check-cache-dropped",
        ]

        mutating func readFormat(into result: inout ImageDescription) throws(ImageError) {
            let hasFile = options.keys.contains { $0.hasPrefix("file.") }
            guard let driver = try text("driver") else {
                guard hasFile else { throw bad("must name a driver or a file") }
                return try readStorage("file.", into: &result)
            }
            result.format = ImageFormat(rawValue: driver) ?? .raw
            if driver == ImageFormat.qcow2.rawValue {
                if let backing = options.removeValue(forKey: "backing") {
                    guard backing == .null else {
                        throw bad("a backing file given here is not supported, but null")
                    }
                    result.ignoresBacking = true
                }
                try readStorage("file.", into: &result)
            } else if driver == ImageFormat.raw.rawValue {
                try readWindow("", into: &result)
                try readStorage("file.", into: &result)
            } else {
                try readStorage("", driver: driver, into: &result)
            }
        }

        private mutating func readStorage(
            _ prefix: String, into result: inout ImageDescription
        ) throws(ImageError) {
            if options[String(prefix.dropLast())] != nil {
                throw bad(
                    "a node's name is not supported: '\(prefix.dropLast())' must be an object")
            }
            try readStorage(prefix, driver: try text(prefix + "driver"), into: &result)
        }

        private mutating func readStorage(
            _ prefix: String, driver: String?, into result: inout ImageDescription
        ) throws(ImageError) {
            switch driver {
            case nil, "file", "host_device":
                guard let path = try bytes(prefix + "filename"), !path.isEmpty else {
                    throw bad("'\(prefix)filename' is missing")
                }
                guard NBDServerCommand(name: ImageName(bytes: path)) == nil else {
                    throw bad("'\(prefix)filename' is a command")
                }
                // With the driver said, the name is a path whatever it looks like.
                result.place =
                    driver == nil ? ImageName(bytes: path) : HostPath(bytes: path).name
            case "nbd": result.place = try exportName(prefix)
            case "raw":
                try readWindow(prefix, into: &result)
                try readStorage(prefix + "file.", into: &result)
            case let driver?: throw bad("driver '\(driver)' is not supported here")
            }
        }

        private mutating func readWindow(
            _ prefix: String, into result: inout ImageDescription
        ) throws(ImageError) {
            let offset = try number(prefix + "offset")
            let size = try number(prefix + "size")
            guard offset != nil || size != nil else { return }
            if let size, size % guestSectorSize != 0 {
                throw bad("'\(prefix)size' is not a multiple of \(guestSectorSize)")
            }
            result.windows.insert(Window(offset: offset ?? 0, size: size), at: 0)
        }

        private mutating func exportName(_ prefix: String) throws(ImageError) -> ImageName {
            let export = try bytes(prefix + "export") ?? []
            let type = try text(prefix + "server.type")
            func either(_ key: String) throws(ImageError) -> [UInt8]? {
                if let value = try bytes(prefix + "server." + key) { return value }
                return try bytes(prefix + key)
            }
            if let path = try either("path") {
                guard type == nil || type == "unix" else {
                    throw bad("a server is not unix and inet")
                }
                let abstract = options.removeValue(forKey: prefix + "server.abstract")
                guard [nil, .bool(false), .string(Array("off".utf8))].contains(abstract) else {
                    throw bad("sockets in the abstract namespace are not supported")
                }
                return ImageName(NBDAddress.unixURI(socket: path, export: export))
            }
            guard type == nil || type == "inet", let host = try either("host")?.text else {
                throw bad("an NBD server needs a host or the path of a socket")
            }
            let port = try either("port")?.text ?? "10809"
            let place = host.utf8.contains(UInt8(ascii: ":")) ? "[\(host)]" : host
            return ImageName("nbd://\(place):\(port)/\(NBDAddress.escaped(export))")
        }

        private mutating func text(_ key: String) throws(ImageError) -> String? {
            try bytes(key)?.text
        }

        private mutating func bytes(_ key: String) throws(ImageError) -> [UInt8]? {
            switch options.removeValue(forKey: key) {
            case nil: return nil
            case .string(let bytes): return bytes
            case .integer(let number): return Array(String(number).utf8)
            default: throw bad("'\(key)' must be a string")
            }
        }

        private mutating func number(_ key: String) throws(ImageError) -> Int64? {
            guard let text = try text(key) else { return nil }
            guard let bytes = parseByteSize(text) else { throw bad("'\(key)' must be a size") }
            return bytes
        }

        func refuseRest() throws(ImageError) {
            let rest = options.keys.filter { key in
                !Self.tuning.contains {
                    key == $0 || key.hasSuffix("." + $0)
                }
            }
            if let key = rest.min() { throw bad("option '\(key)' is not supported") }
        }

        private func bad(_ reason: String) -> ImageError {
            ImageError(.invalid, path: name, reason)
        }
    }
}

/// A value in a description.
private enum OptionTree: Decodable, Equatable {
    case null
    case bool(Bool)
    case integer(Int64)
    case string([UInt8])
    case array([OptionTree])
    case object([String: OptionTree])

    init(from decoder: any Decoder) throws {
        let value = try decoder.singleValueContainer()
        if value.decodeNil() {
            self = .null
        } else if let bool = try? value.decode(Bool.self) {
            self = .bool(bool)
        } else if let integer = try? value.decode(Int64.self) {
            self = .integer(integer)
        } else if let string = try? value.decode(String.self) {
            self = .string(Array(string.utf8))
        } else if let array = try? value.decode([OptionTree].self) {
            self = .array(array)
        } else {
            self = .object(try value.decode([String: OptionTree].self))
        }
    }

    /// Nested objects and dotted keys say the same.
    func flatten(into options: inout [String: OptionTree], key: String) {
        guard case .object(let members) = self else {
            options[key] = self
            return
        }
        for (name, member) in members {
            member.flatten(into: &options, key: key.isEmpty ? name : "\(key).\(name)")
        }
    }
}
