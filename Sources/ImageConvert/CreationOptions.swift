import DiskImage
import ImageFormats

/// What `-o` says about a new image, still as text: `key=value,key=value`.
public struct CreationOptions: Sendable, Equatable {
    public private(set) var values: [(key: String, value: String)] = []

    public init() {}

    public static func == (left: Self, right: Self) -> Bool {
        left.values.elementsEqual(right.values) { $0 == $1 }
    }

    public var isEmpty: Bool { values.isEmpty }

    /// Adds the options of one `-o`. A doubled comma stands for a comma in a value, as with qemu.
    ///
    /// - Throws: `ImageError` for a word that is no `key=value`.
    public mutating func add(_ text: String) throws(ImageError) {
        for word in OptionWords.split(text) {
            guard let equals = word.firstIndex(of: "=") else {
                throw .invalid("expected 'key=value' after -o, got '\(word)'")
            }
            values.append(
                (String(word[..<equals]), String(word[word.index(after: equals)...])))
        }
    }
}

/// The same, understood: what a new image will be like. The last of a repeated key wins.
struct ImageParameters {
    var qcow2 = Qcow2Options()
    /// Of the guest disk, in bytes; nil takes it from the source.
    var size: Int64?
    var backingFile: String?
    var backingFormat: String?

    init(_ options: CreationOptions, for format: ImageFormat) throws(ImageError) {
        for (key, value) in options.values {
            switch (format, key) {
            case (_, "size"): size = try Self.bytes(key, value)
            case (.qcow2, "compat"): qcow2.version = try Self.version(value)
            case (.qcow2, "cluster_size"): qcow2.clusterSize = try Self.bytes(key, value)
            case (.qcow2, "compression_type"):
                guard let type = Qcow2Compression(rawValue: value) else {
                    throw .invalid("invalid value for 'compression_type': '\(value)'")
                }
                qcow2.compression = type
            case (.qcow2, "compression_level"):
                guard let level = Int(value) else {
                    throw .invalid("invalid value for 'compression_level': '\(value)'")
                }
                qcow2.compressionLevel = level
            case (.qcow2, "backing_file"): backingFile = value
            case (.qcow2, "backing_fmt"): backingFormat = value
            default: try Self.checkDefault(format, key, value)
            }
        }
    }

    /// Options that qemu-img knows: saying what is so anyway does no harm, anything else is refused.
    private static func checkDefault(
        _ format: ImageFormat, _ key: String, _ value: String
    ) throws(ImageError) {
        let defaults: [String: Set<String>] =
            switch format {
            case .raw: ["preallocation": ["off"], "nocow": ["off"], "extent_size_hint": ["0"]]
            case .qcow2:
                [
                    "preallocation": ["off"], "nocow": ["off"], "lazy_refcounts": ["off"],
                    "refcount_bits": ["16"], "extended_l2": ["off"], "encryption": ["off"],
                    "data_file_raw": ["off"], "encrypt.format": [], "encrypt.key-secret": [],
                    "data_file": [],
                ]
            }
        guard let allowed = defaults[key] else {
            throw .invalid("unknown option '\(key)' for format '\(format.rawValue)'")
        }
        guard allowed.contains(value) else {
            throw .invalid("option '\(key)=\(value)' is not supported yet")
        }
    }

    private static func bytes(_ key: String, _ value: String) throws(ImageError) -> Int64 {
        guard let bytes = parseByteSize(value) else {
            throw .invalid("invalid size for '\(key)': '\(value)'")
        }
        return bytes
    }

    private static func version(_ value: String) throws(ImageError) -> Int {
        switch value {
        case "0.10", "v2": return 2
        case "1.1", "v3": return 3
        default: throw .invalid("invalid compatibility level: '\(value)'")
        }
    }
}
