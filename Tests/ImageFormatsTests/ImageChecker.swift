import Testing

/// Counts the references of a qcow2 image in memory, from the specification alone: it shares no
/// code with the reader or the writer. Standard L2 entries and 16-bit refcounts, as we write them.
struct ImageChecker {
    let bytes: [UInt8]

    private func number(_ offset: Int, _ width: Int) -> Int {
        bytes[offset..<offset + width].reduce(0) { $0 << 8 | Int($1) }
    }

    /// Holds every cluster's refcount against the references found, and every copied flag against
    /// it.
    func check(sourceLocation: SourceLocation = #_sourceLocation) {
        let clusterBits = number(20, 4)
        let clusterSize = 1 << clusterBits
        #expect(bytes.count % clusterSize == 0, sourceLocation: sourceLocation)
        var found = [Int](repeating: 0, count: bytes.count / clusterSize)
        func use(_ offset: Int, _ length: Int) {
            for cluster in offset / clusterSize...(offset + length - 1) / clusterSize {
                found[cluster] += 1
            }
        }
        use(0, 1)
        let refcountTable = number(48, 8)
        let tableClusters = number(56, 4)
        use(refcountTable, tableClusters * clusterSize)
        var blocks: [Int] = []
        for index in 0..<tableClusters * clusterSize / 8 {
            let block = number(refcountTable + index * 8, 8)
            if block != 0 { use(block, clusterSize) }
            blocks.append(block)
        }
        var singles: [Int] = []
        countTables(clusterBits, use: use) { singles.append($0) }
        let perBlock = clusterSize / 2
        for (cluster, references) in found.enumerated() {
            let block = blocks[cluster / perBlock]
            let stored = block == 0 ? 0 : number(block + cluster % perBlock * 2, 2)
            #expect(stored == references, "cluster \(cluster)", sourceLocation: sourceLocation)
        }
        for offset in singles {
            #expect(found[offset / clusterSize] == 1, sourceLocation: sourceLocation)
        }
    }

    /// - Parameter single: told each host offset whose entry says that it is used once.
    private func countTables(
        _ clusterBits: Int, use: (Int, Int) -> Void, single: (Int) -> Void
    ) {
        let clusterSize = 1 << clusterBits
        let l1Entries = number(36, 4)
        let l1 = number(40, 8)
        if l1Entries > 0 { use(l1, l1Entries * 8) }
        for index in 0..<l1Entries {
            let entry = number(l1 + index * 8, 8)
            guard entry != 0 else { continue }
            let l2 = entry & 0x00ff_ffff_ffff_fe00
            use(l2, clusterSize)
            single(l2)
            for position in stride(from: l2, to: l2 + clusterSize, by: 8) {
                let word = UInt64(truncatingIfNeeded: number(position, 8))
                if word & 1 << 62 != 0 {
                    let offsetBits = UInt64(62 - (clusterBits - 8))
                    let offset = Int(word & (1 << offsetBits - 1))
                    let sectors = Int((word & (1 << 62 - 1)) >> offsetBits) + 1
                    use(offset / 512 * 512, sectors * 512)
                } else if word & 0x00ff_ffff_ffff_fe00 != 0 {
                    let host = Int(word & 0x00ff_ffff_ffff_fe00)
                    use(host, clusterSize)
                    if word >> 63 == 1 { single(host) }
                }
            }
        }
    }
}
