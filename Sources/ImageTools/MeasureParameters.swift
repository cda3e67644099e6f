import DiskImage
import ImageConvert
import ImageFormats

/// What `-o` of `measure` says, understood. All options that qemu-img can create an image with are known, also those that
/// do not change its size: a caller asks with the options that it will create with.
struct MeasureParameters {
    var file = Qcow2Size()
    /// The file gets all its space at once (`preallocation=falloc` and `full`).
    var allocatesAll = false
    var hasBacking = false
    /// Version 2 has none.
    var canHaveBitmaps = true

    private static let switches: Set<String> = [
        "nocow", "lazy_refcounts", "encryption", "data_file_raw", "extended_l2",
    ]
    private static let sizes: Set<String> = ["size", "cluster_size", "extent_size_hint"]
    private static let rawKeys: Set<String> = [
        "size", "preallocation", "nocow", "extent_size_hint",
    ]
    private static let qcow2Keys: Set<String> = rawKeys.union([
        "compat", "backing_file", "backing_fmt", "data_file", "data_file_raw", "encryption",
        "encrypt.format", "encrypt.key-secret", "encrypt.cipher-alg", "encrypt.cipher-mode",
        "encrypt.ivgen-alg", "encrypt.ivgen-hash-alg", "encrypt.hash-alg", "encrypt.iter-time",
        "cluster_size", "lazy_refcounts", "refcount_bits", "compression_type",
        "compression_level", "extended_l2",
    ])

    /// - Throws: `ImageError`, in qemu-img's words.
    init(_ options: CreationOptions, for format: ImageFormat) throws(ImageError) {
        let known = format == .raw ? Self.rawKeys : Self.qcow2Keys
        var values: [String: String] = [:]
        for (key, value) in options.values {
            guard known.contains(key) else { throw .invalid("Invalid parameter '\(key)'") }
            try Self.checkForm(key, value)
            values[key] = value
        }
        guard format == .qcow2 else { return }
        file.hasExtendedL2 = values["extended_l2"] == "on"
        try setClusterSize(values["cluster_size"])
        let version = try Self.version(values["compat"])
        canHaveBitmaps = version >= 3
        try setRefcountBits(values["refcount_bits"], version: version)
        try setPreallocation(values["preallocation"])
        hasBacking = values["backing_file"] != nil
        if values["encrypt.format"] == "luks" {
            throw .invalid("option 'encrypt.format=luks' is not supported yet")
        }
    }

    private static func checkForm(_ key: String, _ value: String) throws(ImageError) {
        if switches.contains(key), value != "on", value != "off" {
            throw .invalid("Parameter '\(key)' expects 'on' or 'off'")
        }
        if sizes.contains(key), parseByteSize(value) == nil {
            throw .invalid(
                "Parameter '\(key)' expects a non-negative number below 2^64; optional suffix k, M, "
                    + "G, T, P or E means kilo-, mega-, giga-, tera-, peta- and exabytes")
        }
        if key == "refcount_bits", UInt64(value) == nil {
            throw .invalid("Parameter 'refcount_bits' expects a number")
        }
    }

    private mutating func setClusterSize(_ text: String?) throws(ImageError) {
        if let text, let size = parseByteSize(text) { file.clusterSize = size }
        guard file.clusterSize.isPowerOfTwo,
            Qcow2Geometry.allowedClusterBits.contains(file.clusterSize.trailingZeroBitCount)
        else { throw .invalid("Cluster size must be a power of two between 512 and 2048k") }
        guard !file.hasExtendedL2 || file.clusterSize >= 16384 else {
            throw .invalid(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes")
        }
    }

    private static func version(_ text: String?) throws(ImageError) -> Int {
        switch text {
        case nil, "1.1": return 3
        case "0.10": return 2
        case .some(let other): throw .invalid("Invalid compatibility level: '\(other)'")
        }
    }

    private mutating func setRefcountBits(
        _ text: String?, version: Int
    ) throws(ImageError) {
        guard let text else { return }
        guard let bits = Int64(text), bits.isPowerOfTwo, bits <= 64 else {
            throw .invalid("Refcount width must be a power of two and may not exceed 64 bits")
        }
        guard version >= 3 || bits == 16 else {
            throw .invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                    + "(use compat=1.1 or greater)")
        }
        file.refcountBits = bits
    }

    private mutating func setPreallocation(_ text: String?) throws(ImageError) {
        switch text {
        case nil, "off", "metadata": break
        case "falloc", "full": allocatesAll = true
        case .some(let other): throw .invalid("invalid parameter value: \(other)")
        }
    }
}
