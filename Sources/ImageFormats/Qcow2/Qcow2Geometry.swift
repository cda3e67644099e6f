import DiskImage

/// A byte offset with the space that it belongs to, so that guest and host offsets never mix by
/// accident.
struct Offset<Space>: Hashable, Comparable, Sendable {
    var bytes: Int64

    init(_ bytes: Int64) { self.bytes = bytes }

    static func < (left: Self, right: Self) -> Bool { left.bytes < right.bytes }
    static func + (left: Self, right: Int64) -> Self { Self(left.bytes + right) }
    static func - (left: Self, right: Self) -> Int64 { left.bytes - right.bytes }
}

enum GuestSpace {}
enum HostSpace {}

/// An offset on the guest disk.
typealias GuestOffset = Offset<GuestSpace>
/// An offset in the image file.
typealias HostOffset = Offset<HostSpace>

/// The division of a qcow2 image's disk into clusters and of its tables into entries.
///
/// Source: QEMU's docs/interop/qcow2.txt, sections "Header" and "Cluster mapping".
public struct Qcow2Geometry: Sendable, Equatable {
    public static let allowedClusterBits = 9...21
    /// Number of subclusters in a cluster, in images with extended L2 entries.
    static let subclustersPerCluster: Int64 = 32
    /// Smallest cluster size with extended L2 entries, in bytes.
    public static let smallestExtendedCluster: Int64 = 16 << 10

    public var clusterBits: Int
    public var hasExtendedL2: Bool
    /// Size of the guest disk in bytes.
    public var virtualSize: Int64

    public init(clusterBits: Int, hasExtendedL2: Bool = false, virtualSize: Int64) {
        self.clusterBits = clusterBits
        self.hasExtendedL2 = hasExtendedL2
        self.virtualSize = virtualSize
    }

    public var clusterSize: Int64 { 1 << Int64(clusterBits) }

    /// Number of 64-bit words in an L2 entry.
    var wordsPerL2Entry: Int64 { hasExtendedL2 ? 2 : 1 }

    var l2Entries: Int64 { clusterSize / 8 / wordsPerL2Entry }

    /// Number of bytes of the guest disk that one L2 table maps.
    var l2Coverage: Int64 { l2Entries * clusterSize }

    /// Number of L1 entries that the disk needs.
    var l1Entries: Int64 { virtualSize.dividedUp(by: l2Coverage) }

    /// Size in bytes of the smallest piece of disk with a state of its own.
    var subclusterSize: Int64 {
        hasExtendedL2 ? clusterSize / Self.subclustersPerCluster : clusterSize
    }

    /// Width in bits of the host offset in the L2 entry of a compressed cluster.
    var compressedOffsetBits: Int64 { 62 - (Int64(clusterBits) - 8) }
}

/// The bits of L1 and L2 entries.
enum Qcow2Entry {
    /// The refcount of the cluster is one.
    static let copied: UInt64 = 1 << 63
    static let compressed: UInt64 = 1 << 62
    /// The cluster reads as zeros (version 3, standard clusters).
    static let zero: UInt64 = 1
    static let offsetMask: UInt64 = 0x00ff_ffff_ffff_fe00
    /// Second word of an extended entry: the lower half says which subclusters are allocated, the
    /// upper half which ones read as zeros.
    static let allSubclustersAllocated: UInt64 = 0x0000_0000_ffff_ffff
    static let allSubclustersZero: UInt64 = 0xffff_ffff_0000_0000
}
