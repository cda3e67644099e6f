import DiskImage

/// How large a qcow2 image gets: what `measure` is asked for.
///
/// Source: QEMU's docs/interop/qcow2.txt; the sum is the one that qemu-img prints, which counts
/// whole tables for all of the disk. A conversion writes no more than that.
public struct Qcow2Size: Sendable {
    /// In bytes.
    public var clusterSize = Qcow2Options.defaultClusterSize
    public var refcountBits = 16
    public var hasExtendedL2 = false

    public init() {}

    private static let maximumL1Size: Int64 = Qcow2Header.maximumL1Entries * 8

    private var l2EntrySize: Int64 { hasExtendedL2 ? 16 : 8 }
    private var l2Entries: Int64 { clusterSize / l2EntrySize }

    /// Whether qemu accepts an L1 table for a disk of this size in bytes.
    public func isAllowed(virtualSize: Int64) -> Bool {
        virtualSize.dividedUp(by: clusterSize).dividedUp(by: l2Entries) * 8 <= Self.maximumL1Size
    }

    /// The size of the file in bytes if every cluster is stored.
    ///
    /// - Parameter virtualSize: of the guest disk in bytes, a multiple of the cluster size.
    public func fullyAllocated(virtualSize: Int64) -> Int64 {
        let l2Tables = (virtualSize / clusterSize).dividedUp(by: l2Entries)
        let l1Clusters = (l2Tables * 8).dividedUp(by: clusterSize)
        let clusters = 1 + l2Tables + l1Clusters + virtualSize / clusterSize
        let refcounts = RefcountMetadataSize(
            counting: clusters, clusterSize: clusterSize, refcountBits: refcountBits)
        return (clusters + refcounts.total) * clusterSize
    }
}
