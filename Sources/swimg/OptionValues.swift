import DiskImage
import ImageConvert
import ImageDrivers
import ImageFormats
import ImageStorage
import ImageTools

// Values of options: each type reads its own, and refuses the others in qemu-img's words.

extension ImageName {
    /// Converts an image argument of the command line to a name that `ImageOpener` knows.
    ///
    /// - Parameters:
    ///   - isOptions: `name` holds a list of options (`--image-opts`).
    ///   - format: the `-f` value, if any; invalid with image options, which name the format
    ///     themselves.
    static func option(
        _ name: ImageName, isOptions: Bool, format: String? = nil
    ) throws(ImageError) -> ImageName {
        guard isOptions else { return name }
        guard format == nil else {
            throw .invalid("--image-opts and --format are mutually exclusive")
        }
        return ImageDescription.name(fromOptions: name.bytes)
    }
}

extension ImageFormat {
    /// - Parameter image: the image that is to be opened in the format; nil if one is to be made.
    static func option(
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
}

extension CacheMode {
    /// - Parameter kind: what qemu-img calls the option in its message.
    static func option(_ name: String, _ kind: String = "source cache") throws(ImageError)
        -> CacheMode
    {
        guard let mode = CacheMode(rawValue: name) else {
            throw ImageError.invalid("invalid cache mode '\(name)': there are \(CacheMode.names)")
                .asQemu("Invalid \(kind) option: \(name)")
        }
        return mode
    }
}

extension DigestAlgorithm {
    /// Reads the name of a digest algorithm.
    static func option(_ name: String) throws(ImageError) -> DigestAlgorithm {
        guard let known = DigestAlgorithm(rawValue: name) else {
            throw .invalid("unknown digest algorithm '\(name)': blkhash and sha256 are known")
        }
        return known
    }
}

extension SnapshotName {
    static func option(_ text: OptionText) throws(ImageError) -> SnapshotName {
        try SnapshotName(text.bytes)
    }
}

extension [OptionText] {
    /// The secrets that `--object` gives.
    func secrets() throws(ImageError) -> Secrets { try Secrets(objects: map(\.bytes)) }
}

extension Int {
    /// Reads the number of an option.
    ///
    /// - Returns: nil if the option is absent.
    static func option(
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
}

extension Int64 {
    /// Reads a number that qemu-img takes without an option letter; errors use qemu-img's words.
    ///
    /// - Parameter name: the number's name in messages.
    static func sizeArgument(
        _ text: String, name: String, in range: ClosedRange<Int64> = 0...Int64.max
    ) throws(ImageError) -> Int64 {
        switch ByteSizeText(text) {
        case .bytes(let number) where range.contains(number): return number
        case .bytes, .outOfRange:
            throw .invalid(
                "Invalid \(name) specified. Must be between \(range.lowerBound) and "
                    + "\(range.upperBound).")
        case .malformed:
            let words = "Invalid \(name) specified. You may use k, M, G, T, P or E suffixes for"
            let units = "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
            throw ImageError.invalid("\(words) \(units)").asQemu(words, hint: "qemu-img: \(units)")
        }
    }

    /// Reads a rate in bytes per second (`-r`); nil sets no limit.
    static func rateOption(_ text: String) throws(ImageError) -> Int64? {
        guard let number = Int64(byteSize: text) else {
            throw .invalid(
                "Invalid rate limit specified. You may use k, M, G, T, P or E suffixes for "
                    + "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.")
        }
        return number > 0 ? number : nil
    }
}

extension CaseIterable where Self: RawRepresentable<String> {
    /// The values of an option, for its help and for messages.
    static var names: String { allCases.map(\.rawValue).joined(separator: ", ") }
}

extension Output {
    /// Whether `--output` asks for JSON rather than text for people.
    static func isJSON(_ form: String) throws(ImageError) -> Bool {
        guard form == "human" || form == "json" else {
            throw .invalid("--output must be used with human or json as argument.")
        }
        return form == "json"
    }
}

extension ImageInPlace {
    /// The warning of a verb that changes an image whose format it had to guess.
    static func guessedRawWarning(_ path: String) -> String {
        """
        WARNING: Image format was not specified for '\(path)' and probing guessed raw.
                 Automatically detecting the format is dangerous for raw images, write operations \
        on block 0 will be restricted.
                 Specify the 'raw' format explicitly to remove the restrictions.

        """
    }
}
