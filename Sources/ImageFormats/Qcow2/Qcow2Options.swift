import DiskImage

/// How a new qcow2 image is to be: what `-o` can say.
public struct Qcow2Options: Sendable, Equatable {
    public static let defaultClusterSize: Int64 = 64 << 10

    /// 3 (`compat=1.1`) or 2 (`compat=0.10`).
    public var version = 3
    /// In bytes, a power of two from 512 to 2 MiB.
    public var clusterSize = Self.defaultClusterSize
    public var compression = Qcow2Compression.zlib
    /// One of `compression.levels`; nil takes the library's own.
    public var compressionLevel: Int?
    public var backing: Backing?

    /// What the new image will lie on.
    public struct Backing: Sendable, Equatable {
        /// As it is to be written into the image.
        public var file: String
        /// nil if the image does not say.
        public var format: String?
        /// Of the backing guest disk, in bytes.
        public var virtualSize: Int64

        public init(file: String, format: String?, virtualSize: Int64) {
            self.file = file
            self.format = format
            self.virtualSize = virtualSize
        }
    }

    public init() {}

    func geometry(virtualSize: Int64) throws(ImageError) -> Qcow2Geometry {
        guard clusterSize.isPowerOfTwo,
            Qcow2Geometry.allowedClusterBits.contains(clusterSize.trailingZeroBitCount)
        else {
            throw .invalid("the cluster size must be a power of two between 512 and 2048k")
        }
        guard version == 3 || compression == .zlib else {
            throw .invalid("compression type \(compression) needs compat=1.1")
        }
        if let compressionLevel, !compression.levels.contains(compressionLevel) {
            throw .invalid(
                "the compression level for \(compression) must be between "
                    + "\(compression.levels.lowerBound) and \(compression.levels.upperBound)")
        }
        let geometry = Qcow2Geometry(
            clusterBits: clusterSize.trailingZeroBitCount, virtualSize: virtualSize)
        guard geometry.l1Entries <= Qcow2Header.maximumL1Entries else {
            throw .invalid(
                "the image size is too large for clusters of \(clusterSize) bytes "
                    + "(try using a larger cluster size)")
        }
        return geometry
    }
}
