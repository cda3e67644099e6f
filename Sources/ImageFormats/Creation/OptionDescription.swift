import DiskImage

/// An option of new images: a key of `-o`.
public struct OptionDescription: Sendable {
    public enum Kind: Sendable {
        case text, switchable, number, size

        /// The name of the kind in qemu-img's listings.
        var label: String {
            switch self {
            case .text: "<str>"
            case .switchable: "<bool (on/off)>"
            case .number: "<num>"
            case .size: "<size>"
            }
        }
    }

    public let name: String
    public let kind: Kind
    public let help: String
    /// The value that `create` prints if none is given; nil prints nothing.
    public var usual: String?
    /// Whether the option belongs to the file that holds the image, not to the format.
    public var isOfFile = false
    /// Whether qemu-img lacks the option; listings then omit it.
    public var isOwn = false

    public init(
        _ name: String, _ kind: Kind, _ help: String, usual: String? = nil, isOfFile: Bool = false,
        isOwn: Bool = false
    ) {
        self.name = name
        self.kind = kind
        self.help = help
        self.usual = usual
        self.isOfFile = isOfFile
        self.isOwn = isOwn
    }
}

extension OptionDescription {
    static let size = OptionDescription("size", .size, "Virtual disk size")
    static let noCopyOnWrite = OptionDescription(
        "nocow", .switchable, "Turn off copy-on-write (valid only on btrfs)", isOfFile: true)
    static let extentSizeHint = OptionDescription(
        "extent_size_hint", .size, "Extent size hint for the image file, 0 to disable",
        isOfFile: true)
}

extension ImageFormat {
    /// - Throws: `ImageError` if images of the format can only be read.
    public func creator() throws(ImageError) -> any ImageCreator {
        guard let creator = driver.creator else {
            throw .invalid("Format driver '\(name)' does not support image creation")
        }
        return creator
    }

    /// - Throws: `ImageError` if options of existing images cannot be changed.
    public func amender() throws(ImageError) -> any ImageAmender {
        guard let amender = driver.amender else {
            throw .invalid("Format driver '\(name)' does not support option amendment")
        }
        return amender
    }

    /// The text that `amend -o help` prints.
    public func amendHelp() throws(ImageError) -> String {
        "Amend options for '\(name)':\n" + Self.list(try amender().options)
    }

    private static func list(_ options: [OptionDescription]) -> String {
        options.sorted { $0.name < $1.name }.map { option in
            let start = "  \(option.name)=\(option.kind.label)"
            let padding = String(repeating: " ", count: max(0, 24 - start.count))
            return "\(start)\(padding) - \(option.help)\n"
        }.joined()
    }

    /// The text that `-o help` prints.
    ///
    /// - Parameter includesFile: also lists the options of the file that holds the image, as
    ///   qemu-img does if the command line names a file.
    public func optionHelp(includesFile: Bool) throws(ImageError) -> String {
        let listed = try creator().options
            .filter { !$0.isOwn && (includesFile || !$0.isOfFile) }
        let title = includesFile ? "Supported options:\n" : "Supported \(name) options:\n"
        let text = title + Self.list(listed)
        guard !includesFile else { return text }
        return text + """

            The protocol level may support further options.
            Specify the target filename to include those options.

            """
    }
}
