import DiskImage

/// The options of a new qcow2 image, as `-o` sets them.
public struct Qcow2Options: Sendable, Equatable {
    public static let defaultClusterSize: Int64 = 64 << 10

    /// Version of the format: 3 (`compat=1.1`) or 2 (`compat=0.10`).
    public var version = 3
    /// Size of a cluster in bytes, a power of two from 512 to 2 MiB.
    public var clusterSize = Self.defaultClusterSize
    public var compression = Qcow2Compression.zlib
    /// One of `compression.levels`; nil is the library's default.
    public var compressionLevel: Int?
    public var backing: Backing?
    /// Width of a refcount in bits, a power of two from 1 to 64.
    public var refcountBits = 16
    /// Whether refcounts may be stale while a machine runs (`lazy_refcounts`).
    public var lazyRefcounts = false
    /// Whether clusters are divided into 32 subclusters, each with a state of its own.
    public var extendedL2 = false
    public var preallocation = Preallocation.off
    /// The file that is to hold the data; nil for the image's own file. A relative path counts from
    /// the working directory.
    public var dataFile: HostPath?
    /// Whether the data file is to be a raw image of the disk as well (`data_file_raw`).
    public var isDataFileRaw = false

    /// Whether every cluster has its place before data is written. The tables of an image with a
    /// raw data file must not hide what is there.
    var placesAhead: Bool { preallocation != .off || isDataFileRaw }
    /// The LUKS header of an encrypted image; nil leaves the image unencrypted.
    var encryption: LUKSVolume?

    /// The backing file of a new image.
    public struct Backing: Sendable, Equatable {
        /// The name to write into the image.
        public var file: ImageName
        /// The format to write into the image; nil writes none.
        public var format: String?
        /// Size of the backing file's guest disk in bytes.
        public var virtualSize: Int64
    }

    public init() {}

    /// Checks that the options are compatible; messages are qemu's, because people search for them.
    public func check() throws(ImageError) {
        if extendedL2 { try needsVersion3("Extended L2 entries are") }
        if dataFile != nil { try needsVersion3("External data files are") }
        guard dataFile != nil || !isDataFileRaw else {
            throw .invalid("data-file-raw requires data-file")
        }
        guard backing == nil || !isDataFileRaw else {
            throw .invalid("Backing file and data-file-raw cannot be used at the same time")
        }
        try checkClusterSize()
        guard preallocation == .off || backing == nil || extendedL2 else {
            throw .invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 "
                    + "is on")
        }
        if lazyRefcounts { try needsVersion3("Lazy refcounts") }
        try checkRefcountBits(remedy: "version=v3")
        if compression != .zlib { try needsVersion3("Non-zlib compression type is") }
        if let compressionLevel, !compression.levels.contains(compressionLevel) {
            throw .invalid(
                "the compression level for \(compression) must be between "
                    + "\(compression.levels.lowerBound) and \(compression.levels.upperBound)")
        }
    }

    func checkClusterSize() throws(ImageError) {
        guard clusterSize.isPowerOfTwo,
            Qcow2Geometry.allowedClusterBits.contains(clusterSize.trailingZeroBitCount)
        else {
            throw .invalid("Cluster size must be a power of two between 512 and 2048k")
        }
        guard !extendedL2 || clusterSize >= Qcow2Geometry.smallestExtendedCluster else {
            throw .invalid(
                "Extended L2 entries are only supported with cluster sizes of at least "
                    + "\(Qcow2Geometry.smallestExtendedCluster) bytes")
        }
    }

    /// - Parameter remedy: names version 3 in the message; qemu's `create` and `measure` differ.
    func checkRefcountBits(remedy: String) throws(ImageError) {
        guard refcountBits.isPowerOfTwo, refcountBits <= 64 else {
            throw .invalid("Refcount width must be a power of two and may not exceed 64 bits")
        }
        guard version == 3 || refcountBits == 16 else {
            throw .invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                    + "(use \(remedy) or greater)")
        }
    }

    private func needsVersion3(_ what: String) throws(ImageError) {
        guard version < 3 else { return }
        throw .invalid(
            "\(what) only supported with compatibility level 1.1 and above "
                + "(use version=v3 or greater)")
    }

    func geometry(virtualSize: Int64) throws(ImageError) -> Qcow2Geometry {
        try check()
        let geometry = Qcow2Geometry(self, virtualSize: virtualSize)
        guard geometry.l1Entries <= Qcow2Header.maximumL1Entries else {
            throw .invalid(
                "The image size is too large for file format 'qcow2' "
                    + "(try using a larger cluster size)")
        }
        return geometry
    }
}

extension Qcow2Geometry {
    /// - Parameter options: options with a valid cluster size.
    init(_ options: Qcow2Options, virtualSize: Int64) {
        self.init(
            clusterBits: options.clusterSize.trailingZeroBitCount,
            hasExtendedL2: options.extendedL2, virtualSize: virtualSize)
    }
}
