import DiskImage

/// The options (`-o`) of `measure`, read. All options that qemu-img can create an image with are
/// known, also those that do not change its size: a caller asks with the options that it will
/// create with.
struct Qcow2MeasureOptions {
    var file = Qcow2Size()
    /// The file gets all its space at once (`preallocation=falloc` and `full`).
    var allocatesAll = false
    var hasBacking = false
    /// Version 2 has none.
    var canHaveBitmaps = true

    /// - Throws: `ImageError`, in qemu-img's words.
    init(_ typed: TypedOptions) throws(ImageError) {
        file.hasExtendedL2 = typed.isOn("extended_l2") ?? false
        try setClusterSize(typed.number("cluster_size"))
        let version = try Self.version(typed.text("compat"))
        canHaveBitmaps = version >= 3
        try setRefcountBits(typed.number("refcount_bits"), version: version)
        try setPreallocation(typed.text("preallocation"))
        hasBacking = typed.text("backing_file") != nil
        if typed.text("encrypt.format") == "luks" {
            throw .invalid("option 'encrypt.format=luks' is not supported yet")
        }
    }

    private mutating func setClusterSize(_ size: Int64?) throws(ImageError) {
        file.clusterSize = size ?? file.clusterSize
        guard file.clusterSize.isPowerOfTwo,
            Qcow2Geometry.allowedClusterBits.contains(file.clusterSize.trailingZeroBitCount)
        else { throw .invalid("Cluster size must be a power of two between 512 and 2048k") }
        guard !file.hasExtendedL2 || file.clusterSize >= Qcow2Geometry.smallestExtendedCluster
        else {
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
        _ bits: Int64?, version: Int
    ) throws(ImageError) {
        guard let bits else { return }
        guard bits.isPowerOfTwo, bits <= 64 else {
            throw .invalid("Refcount width must be a power of two and may not exceed 64 bits")
        }
        guard version >= 3 || bits == 16 else {
            throw .invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                    + "(use compat=1.1 or greater)")
        }
        file.refcountBits = Int(bits)
    }

    private mutating func setPreallocation(_ text: String?) throws(ImageError) {
        switch text {
        case nil, "off", "metadata": break
        case "falloc", "full": allocatesAll = true
        case .some(let other): throw .invalid("invalid parameter value: \(other)")
        }
    }
}
