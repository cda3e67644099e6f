import ArgumentParser
import DiskImage
import HTTPStorage
import ImageConvert
import ImageDrivers
import ImageFormats
import ImageStorage
import NBDStorage

/// Options for connections to servers, which all verbs share.
struct ServerOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            """
            Connections to an HTTP server, or to an NBD export that allows several, 1 to 16 \
            (default: up to 16, and up to 4).
            """,
            valueName: "number"))
    var connections: String?

    @Option(
        help: ArgumentHelp(
            "Requests in flight on each NBD connection, 1 to 64 (default: as many as help).",
            valueName: "number"))
    var requests: String?

    @Option(
        name: .customLong("request-size"),
        help: ArgumentHelp(
            """
            Bytes of an NBD request, a multiple of 4096 up to 32M (default: 256k, 512k to a server \
            on this machine).
            """,
            valueName: "size"))
    var requestSize: String?

    @Option(
        help: ArgumentHelp(
            """
            Time within which a server has to answer (default: 30 for HTTP, unlimited for NBD).
            """,
            valueName: "seconds"))
    var timeout: String?

    @Option(
        help: ArgumentHelp(
            """
            Time to restore a lost NBD connection (default: the loss is an error). A source must \
            not have changed; every write to a target is made stable, which takes longer.
            """, valueName: "seconds"))
    var reconnect: String?

    @Flag(
        name: .customLong("multi-conn"),
        help: "Use several connections also where the NBD server does not announce multi-conn.")
    var multiConn = false

    @OptionGroup var http: HTTPServerOptions

    func options() throws(ImageError) -> StorageOptions {
        var options = StorageOptions()
        options.http = try http.options()
        options.nbd.connections = try optionNumber(
            connections, "connections", NBDOptions.connectionRange)
        options.nbd.requests = try optionNumber(requests, "requests", NBDOptions.requestRange)
        if let requestSize {
            guard let size = parseByteSize(requestSize),
                NBDOptions.requestSizeRange.contains(size), size % 4096 == 0
            else {
                throw .invalid(
                    "invalid size '\(requestSize)': --request-size takes a multiple of 4096 up to 32M"
                )
            }
            options.nbd.requestSize = size
        }
        options.nbd.timeout = try optionNumber(timeout, "timeout", NBDOptions.timeoutRange)
        options.nbd.reconnectTime = try optionNumber(
            reconnect, "reconnect", NBDOptions.reconnectRange)
        options.nbd.forcesMultiConn = multiConn
        options.http.connections = options.nbd.connections
        if let timeout = options.nbd.timeout { options.http.timeout = timeout }
        return options
    }
}

/// Reads the number of an option.
///
/// - Returns: nil if the option is absent.
func optionNumber(
    _ text: String?, _ option: String, _ range: ClosedRange<Int>
) throws(ImageError) -> Int? {
    guard let text else { return nil }
    guard let number = Int(text), range.contains(number) else {
        throw .invalid(
            "invalid number '\(text)': --\(option) takes \(range.lowerBound) to "
                + "\(range.upperBound)")
    }
    return number
}

/// The option for objects, of which secrets are of use.
struct ObjectOptions: ParsableArguments {
    @Option(
        name: .customLong("object"), parsing: .unconditionalSingleValue,
        help: ArgumentHelp(
            "A secret for encrypted images: secret,id=name,file=path or secret,id=name,data=text, "
                + "with format=base64 if it is encoded.", valueName: "object"))
    var objects: [OptionText] = []

    func secrets() throws(ImageError) -> Secrets { try Secrets(objects: objects.map(\.bytes)) }
}

/// Options for naming images: by path, NBD name or image options.
struct ImageNameOptions: ParsableArguments {
    @Flag(
        name: .customLong("image-opts"),
        help: "Images are described by options (driver=qcow2,file.filename=…).")
    var areOptions = false

    @OptionGroup var objects: ObjectOptions

    /// - Parameter format: the `-f` value, if any; invalid with image options, which name the
    ///   format themselves.
    func name(_ name: ImageName, format: String?) throws(ImageError) -> ImageName {
        try imageName(name, isOptions: areOptions, format: format)
    }
}

/// Options for naming and opening the images that a verb reads.
struct SourceOptions: ParsableArguments {
    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "Read images that another process writes to.")
    var forceShare = false

    @OptionGroup var names: ImageNameOptions

    @OptionGroup var servers: ServerOptions

    func name(_ name: ImageName, format: String?) throws(ImageError) -> ImageName {
        try names.name(name, format: format)
    }

    func access(cacheMode: CacheMode = .writeback) throws(ImageError) -> StorageAccess {
        StorageAccess(cacheMode: cacheMode, shareForced: forceShare, options: try storageOptions())
    }

    func storageOptions() throws(ImageError) -> StorageOptions {
        var options = try servers.options()
        options.secrets = try names.objects.secrets()
        return options
    }
}

/// Converts an image argument of the command line to a name that `ImageOpener` knows.
///
/// - Parameters:
///   - isOptions: `name` holds a list of options (`--image-opts`).
///   - format: the `-f` value, if any; invalid with image options, which name the format
///     themselves.
func imageName(
    _ name: ImageName, isOptions: Bool, format: String? = nil
) throws(ImageError) -> ImageName {
    guard isOptions else { return name }
    guard format == nil else {
        throw .invalid("--image-opts and --format are mutually exclusive")
    }
    return ImageDescription.name(fromOptions: name.bytes)
}

/// - Parameter image: the image that is to be opened in the format; nil if one is to be made.
func imageFormat(
    _ name: String, of image: ImageName? = nil
) throws(ImageError) -> ImageFormat {
    guard let format = ImageFormat.named(name) else {
        let error = ImageError.invalid(
            "unknown format '\(name)': there are "
                + ImageFormat.all.map(\.name).joined(separator: ", "))
        guard let image else { throw error.asQemu("Unknown file format '\(name)'") }
        throw error.asQemu("Unknown driver '\(name)'").opening(image.description)
    }
    return format
}

/// - Parameter kind: what qemu-img calls the option in its message.
func cacheMode(_ name: String, _ kind: String = "source cache") throws(ImageError) -> CacheMode {
    guard let mode = CacheMode(rawValue: name) else {
        throw ImageError.invalid("invalid cache mode '\(name)': there are \(CacheMode.names)")
            .asQemu("Invalid \(kind) option: \(name)")
    }
    return mode
}

extension CaseIterable where Self: RawRepresentable<String> {
    /// The values of an option, for its help and for messages.
    static var names: String { allCases.map(\.rawValue).joined(separator: ", ") }
}

/// Whether `--output` asks for JSON rather than text for people.
func wantsJSON(_ output: String) throws(ImageError) -> Bool {
    guard output == "human" || output == "json" else {
        throw .invalid("--output must be used with human or json as argument.")
    }
    return output == "json"
}

/// The option that selects an internal snapshot of a source.
struct SnapshotOptions: ParsableArguments {
    @Option(
        name: [.customShort("l"), .customLong("snapshot")], parsing: .unconditional,
        help: ArgumentHelp(
            "The image as it was when an internal snapshot was taken: its id or name, or "
                + "snapshot.id=…,snapshot.name=….",
            valueName: "snapshot"))
    var snapshot: OptionText?

    /// The selected snapshot; nil if the option is absent.
    func named() throws(ImageError) -> SnapshotName? {
        try snapshot.map { text throws(ImageError) in try SnapshotName(text.bytes) }
    }
}

/// The option that selects a digest algorithm.
struct DigestOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "The digest's algorithm: \(DigestAlgorithm.names) (default: blkhash).",
            valueName: "name"))
    var algorithm: String?

    /// The selected algorithm; nil if the option is absent.
    func named() throws(ImageError) -> DigestAlgorithm? {
        guard let algorithm else { return nil }
        guard let known = DigestAlgorithm(rawValue: algorithm) else {
            throw .invalid("unknown digest algorithm '\(algorithm)': blkhash and sha256 are known")
        }
        return known
    }
}

/// The warning of a verb that changes an image whose format it had to guess.
func guessedRawWarning(_ path: String) -> String {
    """
    WARNING: Image format was not specified for '\(path)' and probing guessed raw.
             Automatically detecting the format is dangerous for raw images, write operations on \
    block 0 will be restricted.
             Specify the 'raw' format explicitly to remove the restrictions.

    """
}

/// Reads a rate in bytes per second (`-r`); nil sets no limit.
func rateLimit(_ text: String) throws(ImageError) -> Int64? {
    guard let number = parseByteSize(text) else {
        throw .invalid(
            "Invalid rate limit specified. You may use k, M, G, T, P or E suffixes for kilobytes, "
                + "megabytes, gigabytes, terabytes, petabytes and exabytes.")
    }
    return number > 0 ? number : nil
}
