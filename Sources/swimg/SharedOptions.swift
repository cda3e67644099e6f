import ArgumentParser
import DiskImage
import ImageConvert
import ImageDrivers
import ImageFormats
import ImageStorage

// Options that verbs share. Each group of options costs time at every start
// (decisions/2026-11-29-start.md), so a single option stands in each verb, with a common help.

extension ArgumentHelp {
    static let object = ArgumentHelp(
        "A secret for encrypted images: secret,id=name,file=path or secret,id=name,data=text, "
            + "with format=base64 if it is encoded.", valueName: "object")
    static let imageOpts: ArgumentHelp =
        "Images are described by options (driver=qcow2,file.filename=…)."
    static let snapshot = ArgumentHelp(
        "The image as it was when an internal snapshot was taken: its id or name, or "
            + "snapshot.id=…,snapshot.name=….", valueName: "snapshot")
    static let algorithm = ArgumentHelp(
        "The digest's algorithm: \(DigestAlgorithm.names) (default: blkhash).", valueName: "name")
}

/// Options for naming images: by path, NBD name or image options.
struct ImageNameOptions: ParsableArguments {
    @Flag(name: .customLong("image-opts"), help: .imageOpts)
    var areOptions = false

    @Option(name: .customLong("object"), parsing: .unconditionalSingleValue, help: .object)
    var objects: [OptionText] = []

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

    @Flag(name: .customLong("image-opts"), help: .imageOpts)
    var areOptions = false

    @Option(name: .customLong("object"), parsing: .unconditionalSingleValue, help: .object)
    var objects: [OptionText] = []

    @OptionGroup var servers: ServerOptions

    /// - Parameter format: see `ImageNameOptions.name`.
    func name(_ name: ImageName, format: String?) throws(ImageError) -> ImageName {
        try imageName(name, isOptions: areOptions, format: format)
    }

    func access(cacheMode: CacheMode = .writeback) throws(ImageError) -> StorageAccess {
        StorageAccess(cacheMode: cacheMode, shareForced: forceShare, options: try storageOptions())
    }

    func storageOptions() throws(ImageError) -> StorageOptions {
        var options = try servers.options()
        options.secrets = try objects.secrets()
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

extension [OptionText] {
    /// The secrets that `--object` gives.
    func secrets() throws(ImageError) -> Secrets { try Secrets(objects: map(\.bytes)) }
}

/// Reads the name of a digest algorithm.
func digestAlgorithm(_ name: String) throws(ImageError) -> DigestAlgorithm {
    guard let known = DigestAlgorithm(rawValue: name) else {
        throw .invalid("unknown digest algorithm '\(name)': blkhash and sha256 are known")
    }
    return known
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
