import DiskImage
import ImageFormats
import ImageStorage

/// An image described by options instead of a name: qemu's `json:{…}` and `--image-opts`.
///
/// Formats and storages take the options that they understand. Options that only tune qemu are
/// ignored. Any other is refused, because it could change the content of the image.
public struct ImageDescription: Sendable, Equatable {
    /// The format; nil if the description does not name it.
    public private(set) var format: ImageFormat?
    /// The path of the file or the name of the export that holds the image. Empty only in the
    /// description of a backing file that leaves its place to the image above.
    public private(set) var place: ImageName = ""
    /// The path or export that holds the data of the image; nil takes the name in its header.
    public private(set) var dataFile: ImageName?
    private var details = DescribedFormat()
    /// The image, what it lies in, and so on down to the storage.
    private var nodes: [Node] = []
    /// The description of the backing file, if there is one: an array, because a structure cannot
    /// hold itself.
    private var backings: [ImageDescription] = []
    /// The description of the image whose disk holds this image's bytes, if there is one.
    private var inners: [ImageDescription] = []

    /// A driver with its options, as qemu shows them.
    private struct Node: Sendable, Equatable {
        /// nil if the description does not name it.
        var driver: String?
        var options: [String: OptionValue]
    }

    /// Whether to open the image without the backing file that it names.
    public private(set) var ignoresBacking = false
    /// The encryption of the image, as far as the description names it.
    public var encryption: DescribedEncryption { details.encryption }
    /// The backing file to open instead of the one that the image names; nil if none is described.
    var backing: ImageDescription? { backings.first }
    /// The image whose disk takes the place of the storage; nil if none is described.
    var inner: ImageDescription? { inners.first }
    /// The parts to cut out of the storage, each out of its predecessor; the last is the image.
    var parts: [DescribedFormat.Part] { details.parts }

    /// Whether the image is all of the storage at `place`.
    public var isWhole: Bool { parts.isEmpty && inners.isEmpty }

    private static let jsonPrefix = Array("json:".utf8)
    /// Ends with the mark, which only names from `name(fromOptions:)` have.
    private static let optionsPrefix = Array("image-opts:".utf8) + [ImageName.mark]

    /// Makes a name of the options of `--image-opts`: `key=value,…`.
    public static func name(fromOptions text: [UInt8]) -> ImageName {
        ImageName(bytes: optionsPrefix + text)
    }

    /// A name as it was typed, for messages.
    static func shown(_ name: ImageName) -> String {
        name.bytes.dropping(prefix: optionsPrefix)?.text ?? name.description
    }

    /// Whether a name is a description in the form that images contain.
    static func isJSON(_ name: ImageName) -> Bool { name.bytes.starts(with: jsonPrefix) }

    private init() {}

    /// Reads the description in a name; nil if the name is none.
    ///
    /// - Throws: `ImageError` if the description is malformed or not supported.
    public init?(_ name: ImageName) throws(ImageError) {
        let options: [String: OptionValue]
        if let list = name.bytes.dropping(prefix: Self.optionsPrefix) {
            options = try Self.options(inList: Array(list))
        } else if let json = name.bytes.dropping(prefix: Self.jsonPrefix) {
            options = try Self.options(inJSON: json, name)
        } else {
            return nil
        }
        var described = DescribedOptions(name: Self.shown(name), options)
        try readDataFile(&described)
        let driver = try described.text("driver")
        try read(&described, "", driver: driver)
        try described.refuseRest()
    }

    private init(
        _ options: inout DescribedOptions, _ prefix: String, driver: String?, isBacking: Bool
    ) throws(ImageError) {
        try read(&options, prefix, driver: driver, isBacking: isBacking)
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
        let value: OptionValue
        do { value = try JSONReader.value(in: text) } catch { throw error.about(name.description) }
        guard case .object = value else {
            throw ImageError(.invalid, path: name.description, "Invalid JSON object given")
        }
        return value.flattened
    }

    private mutating func read(
        _ options: inout DescribedOptions, _ prefix: String, driver: String?,
        isBacking: Bool = false
    ) throws(ImageError) {
        if let driver, ImageFormat.named(driver) == nil {
            // The driver of a storage alone makes its bytes a raw image.
            format = .raw
            return try readStorage(&options, prefix, driver: driver)
        }
        format = driver.flatMap { ImageFormat.named($0) }
        try readFormat(&options, prefix, format)
        try readBacking(&options, prefix)
        let hasFile =
            options.contains(prefix + "file") || options.hasKeys(startingWith: prefix + "file.")
        if isBacking, !hasFile { return }
        guard driver != nil || hasFile else {
            throw options.invalid("must name a driver or a file")
                .asQemu("Must specify either driver or file")
        }
        try readStorage(&options, prefix + "file.")
    }

    private mutating func readFormat(
        _ options: inout DescribedOptions, _ prefix: String, _ format: ImageFormat?
    ) throws(ImageError) {
        let given = options
        try format?.driver.readOptions(from: &options, prefix: prefix, into: &details)
        nodes.append(
            Node(driver: format?.name, options: options.taken(since: given, prefix: prefix)))
    }

    private mutating func readBacking(
        _ options: inout DescribedOptions, _ prefix: String
    ) throws(ImageError) {
        let isDescribed = options.hasKeys(startingWith: prefix + "backing.")
        switch options.take(prefix + "backing") {
        case nil:
            guard isDescribed else { return }
            let driver = try options.text(prefix + "backing.driver")
            backings = [
                try ImageDescription(
                    &options, prefix + "backing.", driver: driver, isBacking: true)
            ]
        case .null, .string([]):
            guard !isDescribed else {
                throw options.invalid("'\(prefix)backing' is both none and described")
            }
            ignoresBacking = true
        default:
            throw options.invalid(
                "a node's name is not supported: '\(prefix)backing' must be an object")
        }
    }

    /// Reads the place of the data file (qemu's `data-file`).
    private mutating func readDataFile(_ options: inout DescribedOptions) throws(ImageError) {
        guard options.hasKeys(startingWith: "data-file") else { return }
        var described = ImageDescription()
        try described.readStorage(&options, "data-file.")
        guard described.isWhole else {
            throw options.invalid("a part of a file cannot be a data file")
        }
        dataFile = described.place
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
        if let driver, let format = ImageFormat.named(driver) {
            guard format.driver.isPlain else {
                let inner = try ImageDescription(
                    &options, prefix, driver: driver, isBacking: false)
                place = inner.place
                nodes += inner.nodes
                inners = [inner]
                return
            }
            try readFormat(&options, prefix, format)
            return try readStorage(&options, prefix + "file.")
        }
        let given = options
        if let driver {
            guard let storage = Storages.named(driver) else {
                throw options.invalid("driver '\(driver)' is not supported here")
            }
            options.driver = driver
            place = try storage.name(from: &options, prefix: prefix)
        } else {
            place = try Self.anyName(&options, prefix)
        }
        nodes.append(
            Node(driver: driver, options: options.taken(since: given, prefix: prefix)))
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

extension ImageDescription {
    // MARK: What qemu shows

    /// The driver that `info` names as the format, if it is not a format: that of a storage alone.
    var storageAsFormat: String? {
        nodes.count == 1 && !place.bytes.isEmpty ? nodes[0].driver : nil
    }

    /// The name of the image or, at a level below it, of what it lies in.
    ///
    /// - Parameter format: the format of the image.
    func shownName(_ format: ImageFormat, level: Int = 0) -> String {
        let below = nodes[level...]
        let storage = Storages.driver(for: place)
        let options = below.last?.options ?? [:]
        let isPlain = below.count == 1 || below.count == 2 && below.first?.options.isEmpty ?? true
        if isPlain, storage.hasPlainName(describedBy: options) {
            return storage.shownName(place.withoutFilePrefix)
        }
        return "json:" + json(level, format).line
    }

    private func json(_ level: Int, _ format: ImageFormat) -> JSONValue {
        let node = nodes[level]
        var members = node.options.map { JSONValue.Member($0.key, $0.value.json) }
        let isStorage = level == nodes.count - 1
        let usual = isStorage ? Storages.driver(for: place).names.first : format.name
        members.append(.init("driver", .string(node.driver ?? usual ?? "")))
        if !isStorage { members.append(.init("file", json(level + 1, format))) }
        return .inQemuOrder(members)
    }

    /// The drivers below the image, the storage last.
    var driversBelow: [String?] { nodes.dropFirst().map(\.driver) }
}
