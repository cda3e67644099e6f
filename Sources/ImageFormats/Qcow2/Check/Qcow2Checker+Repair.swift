import DiskImage
import Glibc
import ImageStorage

// The writes of a repair. A power failure in between leaves the image no worse: refcounts are
// written one by one, new structures go to free clusters, and the header follows a flush.
extension Qcow2Checker {
    /// The fault, in one line, of the places of the tables that are written in place: each has its
    /// clusters for itself. nil if nothing is. Only a check's count of references can tell.
    ///
    /// - Parameter rebuilds: the refcount table and its blocks are to be made anew, and what they
    ///   take now does not count.
    func overlap(rebuilds: Bool) -> String? {
        var tables = [
            (name: "header", clusters: 0..<1), (name: "L1 table", clusters: clustersOfL1),
        ]
        if !rebuilds { tables.append((name: "refcount table", clusters: clustersOfRefcountTable)) }
        for table in tables {
            for cluster in table.clusters {
                let references = counts[cluster]
                // A table that reaches too far is not counted at all, so its clusters look free.
                guard references > 0 || cluster >= counts.clusterCount else {
                    let offset = Int64(table.clusters.lowerBound) * clusterSize
                    return "the \(table.name) at offset \(offset) reaches beyond the end of the "
                        + "file (\(storage.size) bytes): the image cannot be changed, only "
                        + "converted"
                }
                let hasOverflow = overflows.contains(cluster)
                guard references > 1 || hasOverflow else { continue }
                if rebuilds {
                    let blocks = refcounts.table.count {
                        $0 != 0 && $0 == UInt64(cluster) * UInt64(clusterSize)
                    }
                    let going = UInt64(blocks) + (clustersOfRefcountTable.contains(cluster) ? 1 : 0)
                    // A count that has overflown may have been counted less often than it is named.
                    if hasOverflow ? going > 0 : references <= going + 1 { continue }
                }
                return sharing(table.name, cluster)
            }
        }
        return nil
    }

    private func sharing(_ table: String, _ cluster: Int) -> String {
        "the \(table) shares the cluster at offset \(Int64(cluster) * clusterSize) with another part "
            + "of the image: it cannot be changed, only converted"
    }

    private var clustersOfL1: Range<Int> { clusters(header.l1Offset.bytes, header.l1Entries * 8) }

    private var clustersOfRefcountTable: Range<Int> {
        clusters(header.refcountTableOffset.bytes, header.refcountTableClusters * clusterSize)
    }

    private func clusters(_ offset: Int64, _ size: Int64) -> Range<Int> {
        let first = Int(offset / clusterSize)
        return first..<first + Int(size.dividedUp(by: clusterSize))
    }

    /// Whether a table that is said to be here would lie over another kind of metadata, and must
    /// not be written.
    func isOtherMetadata(_ offset: Int64) -> Bool {
        let cluster = Int(offset / clusterSize)
        return cluster == 0 || clustersOfL1.contains(cluster)
            || clustersOfRefcountTable.contains(cluster)
            || header.snapshotCount > 0
                && header.snapshotTableOffset / UInt64(clusterSize) == UInt64(cluster)
            || blockClusters.contains(UInt64(cluster))
    }

    /// Whether an L2 table is that and nothing else: where its cluster is named more than once,
    /// each time by an L1 table.
    private func isOnlyTable(_ offset: Int64) async throws -> Bool {
        let cluster = Int(offset / clusterSize)
        guard !overflows.contains(cluster) else { return false }
        let references = counts[cluster]
        guard references > 1 else { return true }
        if sharedTables == nil { sharedTables = try await findSharedTables() }
        return sharedTables?[cluster] == references
    }

    private func findSharedTables() async throws -> [Int: UInt64] {
        var found: [Int: UInt64] = [:]
        func add(_ table: [UInt64]) {
            for entry in table where entry & Qcow2Entry.offsetMask != 0 {
                let cluster = Int(
                    (entry & Qcow2Entry.offsetMask) >> UInt64(header.geometry.clusterBits))
                if counts[cluster] > 1 { found[cluster, default: 0] += 1 }
            }
        }
        add(l1)
        for snapshot in snapshots { add(try await readL1(of: snapshot)) }
        return found
    }

    /// Whether entries of an L2 table may be changed.
    func isWritableTable(_ offset: Int64) async throws -> Bool {
        guard offset % clusterSize == 0, !isOtherMetadata(offset) else { return false }
        return try await isOnlyTable(offset)
    }

    /// Repairs the image. Everything has been read, and nothing written yet: damage that cannot be
    /// repaired stays as it is.
    ///
    /// - Parameter counted: the damage except that of refcounts.
    /// - Throws: `ImageError` if the repair could make the image worse, before anything is written,
    ///   or if writing fails.
    func mend(_ counted: DamageCounts) async throws {
        let failed = try await dropImpossibleRepairs()
        let rebuilds = needsRebuild && repair == .all
        if let problem = overlap(rebuilds: rebuilds) {
            throw ImageError.corrupt(storage.name, problem)
        }
        guard rebuilds || !needsRebuild else {
            say("ERROR need to rebuild refcount structures")
            throw ImageError.checkFailed(EIO)
        }
        let layout = rebuilds ? try newLayout() : nil
        try await clearUnknownFeatures()
        try await writePendingRepairs()
        if let layout {
            try await rebuildRefcounts(layout)
        } else if damage.leaks > 0 || damage.corruptions > 0 {
            damage = counted
            try await compareRefcounts(repair: repair)
        }
        damage.corruptions += rebuilds ? 0 : failed
        damage.corruptionsFixed -= failed
    }

    /// Drops the repairs of entries in tables that must not be written. Such entries still name
    /// their clusters, so all references are counted again.
    ///
    /// - Returns: number of dropped repairs.
    private func dropImpossibleRepairs() async throws -> Int64 {
        var possible: [EntryRepair] = []
        for repair in pendingRepairs {
            let table = repair.offset / clusterSize * clusterSize
            if try await isWritableTable(table) { possible.append(repair) }
        }
        let failed = Int64(pendingRepairs.count - possible.count)
        pendingRepairs = possible
        if failed > 0 {
            let found = damage
            isSilent = true
            defer { isSilent = false }
            try await countAgain()
            damage = found
        }
        return failed
    }

    private func writePendingRepairs() async throws {
        for repair in pendingRepairs {
            try await image.writable.writeWords(repair.words, at: repair.offset)
        }
        // The refcounts that are lowered next must not come to disk before the entries.
        if !pendingRepairs.isEmpty { try await image.writable.flush() }
        pendingRepairs = []
    }

    /// Counts all references as they are in the file now.
    private func countAgain() async throws {
        repairsEntries = false
        overflows = []
        sharedTables = nil
        fileSize = storage.size.roundedUp(to: guestSectorSize)
        counts = ReferenceCounts(
            clusterCount: Int(fileSize.dividedUp(by: clusterSize)),
            refcountBits: header.refcountBits)
        try await countReferences()
    }

    /// Finds places for new refcounts.
    ///
    /// - Throws: `ImageError` where they would make the file longer and thereby show as data what
    ///   tables name behind its end: an image that was cut short can be completed, until then.
    private func newLayout() throws -> RefcountLayout {
        let oldEnd = UInt64(counts.clusterCount)
        // Some words for each block.
        try MemoryMargin.check(for: counts.clusterCount / refcounts.clustersPerBlock * 64)
        let layout = RefcountLayout(
            &counts, blockEntries: refcounts.clustersPerBlock, clusterSize: clusterSize,
            avoiding: doubtfulClusters)
        guard Int64(layout.tableClusters) * clusterSize <= Qcow2Layout.maximumRefcountTable else {
            throw ImageError.checkFailed(EFBIG)
        }
        let new = oldEnd..<max(oldEnd, UInt64(layout.end))
        // A region that begins in the file and ends behind it is not counted, and looks free where
        // it begins.
        let doubtful = outside.contains { range in
            range.overlaps(new) || layout.takes(range)
        }
        guard !doubtful else {
            throw ImageError.corrupt(
                storage.name,
                "cannot be repaired: its tables name clusters behind the end of the file "
                    + "(\(storage.size) bytes), where new refcounts would have to go")
        }
        return layout
    }

    /// Sets the refcounts of clusters to their numbers of references.
    ///
    /// - Parameter mismatches: of clusters that one block counts, in order.
    func writeRefcounts(_ mismatches: [RefcountComparison.Mismatch]) async throws {
        guard let first = mismatches.first else { return }
        let perBlock = refcounts.clustersPerBlock
        let index = first.cluster / perBlock
        guard var block = try await refcounts.block(index), !block.bytes.isEmpty else { return }
        // Any other count of a block than one made a rebuild necessary when it was counted.
        let offset = Int64(refcounts.blockOffset(index))
        let cluster = Int(offset / clusterSize)
        guard !overflows.contains(cluster) else {
            throw ImageError.corrupt(storage.name, sharing("refcount block", cluster))
        }
        for mismatch in mismatches { block[mismatch.cluster % perBlock] = mismatch.references }
        try await image.writable.writeBytes(block.bytes, at: offset)
    }

    /// Writes new refcount blocks and a new table, and counts everything again.
    private func rebuildRefcounts(_ layout: RefcountLayout) async throws {
        say("Rebuilding refcount structure")
        let before = damage
        try await write(layout)
        damage.corruptions = 0
        damage.leaks = 0
        damage.checkErrors = 0
        needsRebuild = false
        try await readRefcountTable()
        try await countAgain()
        let counted = damage
        // The clusters of the old structures are free now.
        try await compareRefcounts(repair: .leaks)
        if needsRebuild { say("ERROR rebuilt refcount structure is still broken") }
        damage = counted
        damage.corruptionsFixed += max(0, before.corruptions - damage.corruptions)
        damage.leaksFixed += max(0, before.leaks - damage.leaks)
    }

    private func write(_ layout: RefcountLayout) async throws {
        let tableClusters = Int64(layout.tableClusters)
        let end = Int64(layout.end) * clusterSize
        if end > storage.size { try await image.writable.truncate(to: end) }
        var table = [UInt64](repeating: 0, count: Int(tableClusters * clusterSize) / 8)
        for (index, cluster) in layout.blocks {
            try Task.checkCancellation()
            table[index] = UInt64(cluster) * UInt64(clusterSize)
            var block = RefcountBlock(bits: header.refcountBits, byteCount: Int(clusterSize))
            let first = index * block.count
            for cluster in first..<min(first + block.count, counts.clusterCount) {
                block[cluster - first] = counts[cluster]
            }
            try await image.writable.writeBytes(block.bytes, at: Int64(cluster) * clusterSize)
        }
        let tableOffset = Int64(layout.tableCluster) * clusterSize
        try await image.writable.writeWords(table, at: tableOffset)
        try await image.changeHeader {
            $0.refcountTableOffset = HostOffset(tableOffset)
            $0.refcountTableClusters = tableClusters
        }
    }

    /// Clears the autoclear bits that are not known here, before anything that they tell of
    /// changes.
    private func clearUnknownFeatures() async throws {
        guard header.autoclearFeatures & ~Qcow2Header.AutoclearFeature.known != 0 else { return }
        try await image.changeHeader { _ in }
    }

    /// Marks the image as neither dirty nor corrupt.
    func markClean() async throws {
        let marks =
            Qcow2Header.IncompatibleFeature.dirty | Qcow2Header.IncompatibleFeature.corrupt
        guard header.incompatibleFeatures & marks != 0 else {
            return try await image.writable.flush()
        }
        try await image.changeHeader { $0.incompatibleFeatures &= ~marks }
    }
}

/// The places of new refcount blocks and a new table. Pure. Unlike `RefcountMetadataSize`, this
/// searches gaps between other clusters, and makes no block for a range without references.
struct RefcountLayout {
    /// Index of the block and host cluster, in order.
    private(set) var blocks: [(index: Int, cluster: Int)] = []
    private(set) var tableCluster = 0
    private(set) var tableClusters = 0

    /// Finds places where nothing is, and counts them in.
    ///
    /// - Parameter avoiding: clusters that are not to be used although nothing refers to them.
    init(
        _ counts: inout ReferenceCounts, blockEntries: Int, clusterSize: Int64,
        avoiding taken: Set<Int>
    ) {
        var placed: Set<Int> = []
        var cursor = 0
        var grows = true
        while grows {
            grows = false
            // Placing a block can need another one that counts it: that one comes later in the
            // loop.
            var index = 0
            while index * blockEntries < counts.clusterCount {
                let range = index * blockEntries..<(index + 1) * blockEntries
                if !placed.contains(index), counts.hasReferences(in: range) {
                    let cluster = counts.firstFree(
                        1, from: max(cursor, range.lowerBound), avoiding: taken)
                    cursor = cluster + 1
                    counts.take(cluster..<cluster + 1)
                    placed.insert(index)
                    blocks.append((index, cluster))
                    grows = true
                }
                index += 1
            }
            let entries = (blocks.map(\.index).max() ?? 0) + 1
            let needed = Int(Int64(entries * 8).dividedUp(by: clusterSize))
            guard needed != tableClusters else { continue }
            counts.release(tableCluster..<tableCluster + tableClusters)
            tableClusters = needed
            tableCluster = counts.firstFree(needed, from: 0, avoiding: taken)
            counts.take(tableCluster..<tableCluster + needed)
            grows = true
        }
        blocks.sort { $0.index < $1.index }
    }

    /// Whether a table or block goes to one of these clusters.
    func takes(_ range: Range<UInt64>) -> Bool {
        let table = UInt64(tableCluster)..<UInt64(tableCluster + tableClusters)
        return range.overlaps(table) || blocks.contains { range.contains(UInt64($0.cluster)) }
    }

    /// The first cluster behind all of them.
    var end: Int { max((blocks.map(\.cluster).max() ?? 0) + 1, tableCluster + tableClusters) }
}
