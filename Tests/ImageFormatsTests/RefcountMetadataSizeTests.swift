import Testing

@testable import ImageFormats

@Suite struct RefcountMetadataSizeTests {
    /// No smaller number of blocks and table clusters counts all clusters, with these themselves.
    @Test(arguments: [1, 16, 64], [512, 65536] as [Int64])
    func isTheSmallestThatCountsItself(_ bits: Int, _ clusterSize: Int64) {
        let perBlock = clusterSize * 8 / Int64(bits)
        func fits(_ clusters: Int64, _ blocks: Int64, _ table: Int64) -> Bool {
            clusters + blocks + table <= blocks * perBlock && blocks * 8 <= table * clusterSize
        }
        let edges = [1, 64, perBlock, 63 * perBlock, 64 * perBlock, 1000 * perBlock]
        for clusters in edges.flatMap({ $0..<$0 + 70 }) {
            let size = RefcountMetadataSize(
                counting: clusters, clusterSize: clusterSize, refcountBits: bits)
            #expect(size.total == size.blocks + size.tableClusters)
            #expect(fits(clusters, size.blocks, size.tableClusters))
            #expect(!fits(clusters, size.blocks - 1, size.tableClusters))
            #expect(!fits(clusters, size.blocks, size.tableClusters - 1))
        }
    }

    /// By hand: 1000 clusters of 512 bytes need 4 blocks of 256 counts and a table of one cluster.
    @Test func examples() {
        let small = RefcountMetadataSize(counting: 1000, clusterSize: 512, refcountBits: 16)
        #expect(small.blocks == 4 && small.tableClusters == 1)
        // 64 blocks fill a cluster of the table: the 65th needs another one.
        let full = RefcountMetadataSize(counting: 64 * 255 - 1, clusterSize: 512, refcountBits: 16)
        #expect(full.blocks == 64 && full.tableClusters == 1)
        let more = RefcountMetadataSize(counting: 64 * 255, clusterSize: 512, refcountBits: 16)
        #expect(more.blocks == 65 && more.tableClusters == 2)
    }
}
