import DiskImage
import ImageFormats

/// One key that `-o` can name, as qemu-img knows it.
package struct OptionDescription: Sendable {
    enum Kind: Sendable {
        case text, switchable, number, size

        /// As qemu-img's listings say.
        var label: String {
            switch self {
            case .text: "<str>"
            case .switchable: "<bool (on/off)>"
            case .number: "<num>"
            case .size: "<size>"
            }
        }
    }

    let name: String
    let kind: Kind
    let help: String
    /// What is printed where nothing was said; nil prints nothing.
    var usual: String?
    /// Of the file that holds the image, not of its format.
    var isOfFile = false
    /// Ours: qemu-img's listings do not have it.
    var isOwn = false

    init(
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

/// The keys of `-o` for each format, in the order in which qemu-img prints them when it creates an image.
package enum OptionSchema {
    package static func options(of format: ImageFormat) -> [OptionDescription] {
        switch format {
        case .raw: raw
        case .qcow2: qcow2 + fileAttributes
        }
    }

    /// What `-o help` prints.
    ///
    /// - Parameter includesFile: also what the file that holds the image can be asked for: a name for it
    ///   was given.
    package static func help(for format: ImageFormat, includesFile: Bool) -> String {
        let listed = options(of: format)
            .filter { !$0.isOwn && (includesFile || !$0.isOfFile) }
            .sorted { $0.name < $1.name }
        var text = includesFile ? "Supported options:\n" : "Supported \(format.rawValue) options:\n"
        for option in listed {
            let start = "  \(option.name)=\(option.kind.label)"
            let padding = String(repeating: " ", count: max(0, 24 - start.count))
            text += "\(start)\(padding) - \(option.help)\n"
        }
        guard !includesFile else { return text }
        return text + """

            The protocol level may support further options.
            Specify the target filename to include those options.

            """
    }

    private static let size = OptionDescription("size", .size, "Virtual disk size")

    private static let noCow = OptionDescription(
        "nocow", .switchable, "Turn off copy-on-write (valid only on btrfs)", isOfFile: true)
    private static let extentSizeHint = OptionDescription(
        "extent_size_hint", .size, "Extent size hint for the image file, 0 to disable",
        isOfFile: true)
    private static let fileAttributes = [noCow, extentSizeHint]

    private static let raw = [
        size, noCow,
        OptionDescription(
            "preallocation", .text, "Preallocation mode (allowed values: off, falloc, full)",
            isOfFile: true),
        extentSizeHint,
    ]

    private static let qcow2 = [
        OptionDescription(
            "encryption", .switchable,
            "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)"),
        OptionDescription(
            "encrypt.format", .text, "Encrypt the image, format choices: 'aes', 'luks'"),
        OptionDescription(
            "encrypt.key-secret", .text,
            "ID of secret providing qcow AES key or LUKS passphrase"),
        OptionDescription("encrypt.cipher-alg", .text, "Name of encryption cipher algorithm"),
        OptionDescription("encrypt.cipher-mode", .text, "Name of encryption cipher mode"),
        OptionDescription("encrypt.ivgen-alg", .text, "Name of IV generator algorithm"),
        OptionDescription("encrypt.ivgen-hash-alg", .text, "Name of IV generator hash algorithm"),
        OptionDescription("encrypt.hash-alg", .text, "Name of encryption hash algorithm"),
        OptionDescription(
            "encrypt.iter-time", .number, "Time to spend in PBKDF in milliseconds"),
        OptionDescription("cluster_size", .size, "qcow2 cluster size", usual: "65536"),
        OptionDescription("extended_l2", .switchable, "Extended L2 tables", usual: "off"),
        OptionDescription(
            "preallocation", .text,
            "Preallocation mode (allowed values: off, metadata, falloc, full)"),
        OptionDescription(
            "compression_type", .text, "Compression method used for image cluster compression",
            usual: "zlib"),
        OptionDescription("compression_level", .text, "", isOwn: true),
        size,
        OptionDescription("compat", .text, "Compatibility level (v2 [0.10] or v3 [1.1])"),
        OptionDescription("backing_file", .text, "File name of a base image"),
        OptionDescription("backing_fmt", .text, "Image format of the base image"),
        OptionDescription("data_file", .text, "File name of an external data file"),
        OptionDescription(
            "data_file_raw", .switchable, "The external data file must stay valid as a raw image"),
        OptionDescription(
            "lazy_refcounts", .switchable, "Postpone refcount updates", usual: "off"),
        OptionDescription(
            "refcount_bits", .number, "Width of a reference count entry in bits", usual: "16"),
    ]
}
