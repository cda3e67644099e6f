/// The keys of `-o` for qcow2 images.
enum Qcow2OptionTable {
    static let options =
        encryption + OptionDescription.encryption(prefix: Qcow2Encryption.prefix) + others

    private static let encryption: [OptionDescription] = [
        OptionDescription(
            "encryption", .switchable,
            "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)"),
        OptionDescription(
            "encrypt.format", .text, "Encrypt the image, format choices: 'aes', 'luks'"),
        OptionDescription(
            "encrypt.key-secret", .text,
            "ID of secret providing qcow AES key or LUKS passphrase"),
    ]

    private static let others: [OptionDescription] = [
        OptionDescription(
            "cluster_size", .size, "qcow2 cluster size", usual: "\(Qcow2Options.defaultClusterSize)"
        ),
        OptionDescription("extended_l2", .switchable, "Extended L2 tables", usual: "off"),
        OptionDescription(
            "preallocation", .text,
            "Preallocation mode (allowed values: off, metadata, falloc, full)"),
        OptionDescription(
            "compression_type", .text, "Compression method used for image cluster compression",
            usual: "zlib"),
        OptionDescription("compression_level", .text, "", isOwn: true),
        .size,
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
        .noCopyOnWrite, .extentSizeHint,
    ]
}
