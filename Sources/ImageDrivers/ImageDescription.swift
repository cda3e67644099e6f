import DiskImage
import FoundationEssentials
import ImageFormats
import ImageStorage

/// An image described by options instead of a name: qemu's `json:{…}` and `--image-opts`.
///
/// Formats and storages take the options that they understand. Options that only tune qemu are
/// ignored. Any other is refused, because it could change the content of the image.
public struct ImageDescription: Sendable, Equatable {
    /// The format; nil if the description does not name it.
    public private(set) var format: ImageFormat?
    /// The path of the file or the name of the export that holds the image.
    public private(set) var place: ImageName = ""
    private var details = DescribedFormat()

    /// Whether to open the image without the backing file that it names.
    public var ignoresBacking: Bool { details.ignoresBacking }
    /// The encryption of the image, as far as the description names it.
    public var encryption: DescribedEncryption { details.encryption }
    /// The parts to cut out of the storage, each out of its predecessor; the last is the image.
    var parts: [DescribedFormat.Part] { details.parts }

    /// Whether the image is all of the storage at `place`.
    public var isWhole: Bool { parts.isEmpty }

    private static let jsonPrefix = Array("json:".utf8)
    /// Ends with the mark, which only names from `name(fromOptions:)` have.
    private static let optionsPrefix = Array("image-opts:".utf8) + [ImageName.mark]

    /// Makes a name of the options of `--image-opts`: `key=value,…`.
    public static func name(fromOptions text: [UInt8]) -> ImageName {
        ImageName(bytes: optionsPrefix + text)
    }

    /// Whether a name is a description in the form that images contain.
    static func isJSON(_ name: ImageName) -> Bool { name.bytes.starts(with: jsonPrefix) }

    /// Reads the description in a name; nil if the name is none.
    ///
    /// - Throws: `ImageError` if the description is malformed or not supported.
    public init?(_ name: ImageName) throws(ImageError) {
        let options: [String: OptionValue]
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
        var described = DescribedOptions(name: text.text, options)
        try readFormat(&described)
        try described.refuseRest()
    }

    private static func options(
        inList text: [UInt8]
    ) throws(ImageError) -> [String: OptionValue] {
        var options: [String: OptionValue] = [:]
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
    ) throws(ImageError) -> [String: OptionValue] {
        do {
            let tree = try JSONDecoder().decode([String: OptionValue].self, from: Data(text))
            return OptionValue.object(tree).flattened
        } catch {
            throw ImageError(
                .invalid, path: name.description, "is not a JSON object that describes an image")
        }
    }

    private mutating func readFormat(
        _ options: inout DescribedOptions
    ) throws(ImageError) {
        guard let driver = try options.text("driver") else {
            guard options.hasKeys(startingWith: "file.") else {
                throw options.invalid("must name a driver or a file")
            }
            return try readStorage(&options, "file.")
        }
        guard let known = ImageFormat.named(driver) else {
            // The driver of a storage alone makes its bytes a raw image.
            format = .raw
            return try readStorage(&options, "", driver: driver)
        }
        format = known
        try known.driver.readOptions(from: &options, prefix: "", into: &details)
        try readStorage(&options, "file.")
    }

    private mutating func readStorage(
        _ options: inout DescribedOptions, _ prefix: String
    ) throws(ImageError) {
        if options.take(String(prefix.dropLast())) != nil {
            throw options.invalid(
                "a node's name is not supported: '\(prefix.dropLast())' must be an object")
        }
        try readStorage(&options, prefix, driver: try options.text(prefix + "driver"))
    }

    private mutating func readStorage(
        _ options: inout DescribedOptions, _ prefix: String, driver: String?
    ) throws(ImageError) {
        guard let driver else {
            place = try Self.anyName(&options, prefix)
            return
        }
        if let storage = Storages.named(driver) {
            place = try storage.name(from: &options, prefix: prefix)
        } else if let format = ImageFormat.named(driver), format.driver.isPlain {
            try format.driver.readOptions(from: &options, prefix: prefix, into: &details)
            try readStorage(&options, prefix + "file.")
        } else {
            throw options.invalid("driver '\(driver)' is not supported here")
        }
    }

    /// Reads a name without a driver; the name decides on the driver when it is opened.
    private static func anyName(
        _ options: inout DescribedOptions, _ prefix: String
    ) throws(ImageError) -> ImageName {
        guard let bytes = try options.bytes(prefix + "filename"), !bytes.isEmpty else {
            throw options.invalid("'\(prefix)filename' is missing")
        }
        let name = ImageName(bytes: bytes)
        guard !name.isMarked else { throw options.invalid("'\(prefix)filename' is a command") }
        return name
    }
}
