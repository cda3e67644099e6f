import DiskImage

/// The number of clusters for refcount blocks and table of an image without holes. They count
/// themselves, too.
struct RefcountMetadataSize: Equatable {
    private(set) var blocks: Int64 = 0
    private(set) var tableClusters: Int64 = 0

    /// Number of clusters of both.
    var total: Int64 { blocks + tableClusters }

    /// - Parameters:
    ///   - clusters: number of all other clusters.
    ///   - clusterSize: size of a cluster in bytes.
    ///   - refcountBits: width of a refcount in bits.
    init(counting clusters: Int64, clusterSize: Int64, refcountBits: Int) {
        let clustersPerBlock = RefcountBlock.count(bits: refcountBits, byteCount: clusterSize)
        var before: Self
        repeat {
            before = self
            blocks = (clusters + before.total).dividedUp(by: clustersPerBlock)
            tableClusters = (blocks * 8).dividedUp(by: clusterSize)
        } while self != before
    }
}
