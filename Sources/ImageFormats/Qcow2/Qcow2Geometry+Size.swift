import DiskImage

extension Qcow2Geometry {
    /// The size of an image file in bytes if every cluster is stored: the sum that `qemu-img
    /// measure` prints. A conversion writes no more.
    ///
    /// The virtual size has to be a multiple of the cluster size.
    func fullyAllocatedSize(refcountBits: Int) -> Int64 {
        let l1Clusters = (l1Entries * 8).dividedUp(by: clusterSize)
        let clusters = 1 + l1Entries + l1Clusters + virtualSize / clusterSize
        let refcounts = RefcountMetadataSize(
            counting: clusters, clusterSize: clusterSize, refcountBits: refcountBits)
        return (clusters + refcounts.total) * clusterSize
    }
}
