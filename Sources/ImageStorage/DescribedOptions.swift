import DiskImage

/// The options of a described image (`json:{…}`, `--image-opts`) by their dotted keys. A driver
/// takes the options that it understands; any option left in the end is refused, because it may
/// change what the image holds.
public struct DescribedOptions: Sendable {
    /// The description, for messages.
    public let name: String
    private var values: [String: OptionValue]
    /// The driver that is asked for a name; one driver can have several names.
    public var driver = ""

    /// An option whose value is null counts as absent, as in qemu, but for backing files: it means
    /// that there is none.
    public init(name: String, _ values: [String: OptionValue]) {
        self.name = name
        self.values = values.filter { key, value in
            value != .null || key == "backing" || key.hasSuffix(".backing")
        }
    }

    public func hasKeys(startingWith prefix: String) -> Bool {
        values.keys.contains { $0.hasPrefix(prefix) }
    }

    public func contains(_ key: String) -> Bool { values[key] != nil }

    /// The options that have been taken from an earlier state, without the prefix of their keys.
    public func taken(since earlier: DescribedOptions, prefix: String) -> [String: OptionValue] {
        var taken: [String: OptionValue] = [:]
        for (key, value) in earlier.values where values[key] == nil {
            taken[String(key.dropFirst(prefix.count))] = value
        }
        return taken
    }

    public mutating func take(_ key: String) -> OptionValue? { values.removeValue(forKey: key) }

    /// - Throws: `ImageError` for a value that is neither a string nor a number.
    public mutating func bytes(_ key: String) throws(ImageError) -> [UInt8]? {
        switch take(key) {
        case nil: return nil
        case .string(let bytes): return bytes
        case .integer(let number): return Array(String(number).utf8)
        default: throw invalid("'\(key)' must be a string")
        }
    }

    public mutating func text(_ key: String) throws(ImageError) -> String? {
        try bytes(key)?.text
    }

    /// Takes a size in bytes.
    public mutating func size(_ key: String) throws(ImageError) -> Int64? {
        guard let text = try text(key) else { return nil }
        guard let bytes = Int64(byteSize: text) else {
            throw invalid("'\(key)' must be a size in bytes")
        }
        return bytes
    }

    public func invalid(_ reason: String) -> ImageError {
        ImageError(.invalid, path: name, reason)
    }

    /// Options that do not change the bytes that are read.
    private static let tuning: Set<String> = [
        "aio", "auto-read-only", "cache-clean-interval", "cache-size", "cache.direct",
        "cache.no-flush", "cache.writeback", "detect-zeroes", "discard", "drop-cache",
        "force-share", "l2-cache-entry-size", "l2-cache-size", "latency-ns", "lazy-refcounts",
        "locking", "node-name", "open-timeout", "overlap-check", "pass-discard-other",
        "pass-discard-request", "pass-discard-snapshot", "pr-manager", "read-only",
        "reconnect-delay", "refcount-cache-size", "server.ipv4", "server.ipv6",
        "server.keep-alive", "server.mptcp", "server.numeric", "server.tight", "server.to",
        "x-check-cache-dropped",
    ]

    /// - Throws: `ImageError` if an option is left that does more than tune qemu.
    public func refuseRest() throws(ImageError) {
        let rest = values.keys.filter { key in
            !Self.tuning.contains { key == $0 || key.hasSuffix("." + $0) }
        }
        if let key = rest.min() { throw invalid("option '\(key)' is not supported") }
    }
}
