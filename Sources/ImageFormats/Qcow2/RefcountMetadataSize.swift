import DiskImage

/// The size of refcount blocks and table of an image without holes, which count themselves, too.
struct RefcountMetadataSize: Equatable {
    private(set) var blocks: Int64 = 0
    private(set) var tableClusters: Int64 = 0

    /// In clusters.
    var total: Int64 { blocks + tableClusters }

    /// - Parameters:
    ///   - clusters: the number of all other clusters.
    ///   - clusterSize: in bytes.
    ///   - refcountBits: the width of one refcount.
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
