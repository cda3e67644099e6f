import DiskImage

/// Decides where everything of a new image goes. Pure: answers with what to write, writes nothing.
///
/// Host clusters are handed out one after the other, in guest order:
///
///     header | refcount block 0 | L2, data, data, … | refcount block 1 | … | L1 | refcount table
///
/// A refcount block is the first cluster of the range that it counts; an L2 table stands before the
/// first data that it maps. So each table is complete once the next one begins, and is handed out
/// to be written then: memory holds one of each and one run of compressed clusters, whatever the
/// size of the image. L1 and refcount table come last, when their contents and sizes are known.
struct Qcow2Layout: ~Copyable {
    /// Longest refcount table that qemu accepts, in bytes.
    static let maximumRefcountTable: Int64 = 8 << 20

    private let geometry: Qcow2Geometry
    private let clusterSize: Int64
    /// Number of clusters that one refcount block counts.
    private let clustersPerBlock: Int64
    /// Whether data goes to another file, each cluster to its guest offset.
    private let hasDataFile: Bool

    private var nextCluster: Int64
    private var l1: [UInt64]
    private var refcountTable: [UInt64]
    private var refcounts: RefcountBlock
    private var openL2: (index: Int64, host: HostOffset, entries: [UInt64])?
    /// End of the last compressed cluster, where the next one begins if it fits.
    private var compressedEnd: HostOffset?
    private var stream: CompressedStream

    /// - Parameter blockSize: best unit of writes to the storage, in bytes.
    init(
        _ geometry: Qcow2Geometry, refcountBits: Int, blockSize: Int64 = 1,
        hasDataFile: Bool = false
    ) {
        self.geometry = geometry
        self.hasDataFile = hasDataFile
        clusterSize = geometry.clusterSize
        stream = CompressedStream(clusterSize: clusterSize, blockSize: blockSize)
        l1 = Array(repeating: 0, count: Int(geometry.l1Entries))
        // The header is cluster 0, its refcount block cluster 1.
        refcounts = RefcountBlock(bits: refcountBits, byteCount: Int(clusterSize))
        clustersPerBlock = Int64(refcounts.count)
        refcounts[0] = 1
        refcounts[1] = 1
        refcountTable = [UInt64(clusterSize)]
        nextCluster = 2
    }

    /// Finds a place for each piece, in guest order, and completes the tables that lie behind it.
    ///
    /// - Parameter encoded: the buffer with the compressed clusters.
    /// - Throws: `ImageError` if memory is short.
    mutating func place(
        _ pieces: [EncodedPiece], encoded: RawSpan
    ) throws(ImageError) -> Placement {
        if let last = pieces.last,
            (last.guestRange.upperBound - 1) / geometry.l2Coverage != openL2?.index
        {
            // Room for the tables that are opened and closed.
            try MemoryMargin.check(for: 4 * Int(clusterSize))
        }
        var placement = Placement()
        for piece in pieces {
            let start = piece.guestRange.lowerBound
            switch piece.form {
            case .zero: placeZeros(piece.guestRange, &placement)
            case .plain(let positions) where geometry.hasExtendedL2:
                placeSubclusters(start, positions, &placement)
            case .plain(let positions):
                let length = Int(clusterSize)
                for first in stride(
                    from: positions.lowerBound, to: positions.upperBound, by: length)
                {
                    let host = placeCluster(
                        GuestOffset(start + Int64(first - positions.lowerBound)),
                        subclusters: Qcow2Entry.allSubclustersAllocated, &placement)
                    placement.append(.plain(first..<first + length), at: host.bytes)
                }
            case .compressed(let positions):
                try placeCompressed(
                    at: GuestOffset(start), encoded.extracting(positions), &placement)
            }
        }
        return placement
    }

    private mutating func placeZeros(_ range: Range<Int64>, _ placement: inout Placement) {
        for guest in stride(
            from: range.lowerBound.roundedDown(to: clusterSize), to: range.upperBound,
            by: Int64.Stride(clusterSize))
        {
            if geometry.hasExtendedL2 {
                let bits = subclusters(range.clamped(to: guest..<guest + clusterSize))
                openTable(for: GuestOffset(guest), &placement)
                let index = entryIndex(GuestOffset(guest))
                openL2?.entries[index + 1] |= bits << 32
            } else {
                setEntry(GuestOffset(guest), Qcow2Entry.zero, &placement)
            }
        }
    }

    /// Places the subclusters of a piece. A cluster gets its place with the first of them, which
    /// can come with an earlier piece; those that hold no data stay holes of the file.
    private mutating func placeSubclusters(
        _ start: Int64, _ positions: Range<Int>, _ placement: inout Placement
    ) {
        var position = positions.lowerBound
        while position < positions.upperBound {
            let guest = start + Int64(position - positions.lowerBound)
            let inCluster = guest % clusterSize
            let end = min(positions.upperBound, position + Int(clusterSize - inCluster))
            let cluster = GuestOffset(guest - inCluster)
            openTable(for: cluster, &placement)
            let index = entryIndex(cluster)
            let host: HostOffset
            if let entry = openL2?.entries[index], entry & Qcow2Entry.copied != 0 {
                host = HostOffset(Int64(entry & Qcow2Entry.offsetMask))
            } else {
                host = placeCluster(
                    cluster, subclusters: openL2?.entries[index + 1] ?? 0, &placement)
            }
            let bits = subclusters(guest..<guest + Int64(end - position))
            openL2?.entries[index + 1] |= bits
            placement.append(.plain(position..<end), at: host.bytes + inCluster)
            position = end
        }
    }

    /// The bits that say "allocated" of a range of the disk within one cluster.
    private func subclusters(_ range: Range<Int64>) -> UInt64 {
        let size = geometry.subclusterSize
        let first = range.lowerBound % clusterSize / size
        let count = Int64(range.count).dividedUp(by: size)
        return
            (Qcow2Entry.allSubclustersAllocated
            >> UInt64(Qcow2Geometry.subclustersPerCluster - count))
            << UInt64(first)
    }

    /// Gives a guest cluster a host cluster of its own; in a data file that of its offset.
    ///
    /// - Parameter subclusters: second word of an extended entry.
    private mutating func placeCluster(
        _ guest: GuestOffset, subclusters: UInt64, _ placement: inout Placement
    ) -> HostOffset {
        openTable(for: guest, &placement)
        let host = hasDataFile ? HostOffset(guest.bytes) : allocateCluster(&placement)
        setEntry(
            guest, UInt64(host.bytes) | Qcow2Entry.copied, subclusters: subclusters, &placement)
        return host
    }

    private mutating func placeCompressed(
        at guest: GuestOffset, _ bytes: RawSpan, _ placement: inout Placement
    ) throws(ImageError) {
        openTable(for: guest, &placement)
        let host = allocateBytes(Int64(bytes.byteCount), &placement)
        setEntry(
            guest,
            Qcow2CompressedCluster.entry(host, length: Int64(bytes.byteCount), geometry),
            &placement)
        try stream.append(bytes, at: host.bytes, to: &placement)
    }

    /// Takes back a run of a placement that has been written.
    mutating func reuse(_ run: CompressedRun) { stream.reuse(run) }

    /// Gives a place to every cluster that one L2 table maps, with nothing to write there.
    ///
    /// - Parameter subclusters: second word of extended entries.
    mutating func preallocate(table: Int64, subclusters: UInt64) -> Placement {
        var placement = Placement()
        let end = min((table + 1) * geometry.l2Coverage, geometry.virtualSize)
        for guest in stride(
            from: table * geometry.l2Coverage, to: end, by: Int64.Stride(clusterSize))
        {
            _ = placeCluster(GuestOffset(guest), subclusters: subclusters, &placement)
        }
        return placement
    }

    // MARK: Tables

    private mutating func setEntry(
        _ guest: GuestOffset, _ entry: UInt64, subclusters: UInt64 = 0,
        _ placement: inout Placement
    ) {
        openTable(for: guest, &placement)
        let index = entryIndex(guest)
        openL2?.entries[index] = entry
        if geometry.hasExtendedL2 { openL2?.entries[index + 1] = subclusters }
    }

    private func entryIndex(_ guest: GuestOffset) -> Int {
        Int(guest.bytes % geometry.l2Coverage / clusterSize * geometry.wordsPerL2Entry)
    }

    private mutating func openTable(for guest: GuestOffset, _ placement: inout Placement) {
        let index = guest.bytes / geometry.l2Coverage
        if openL2?.index == index { return }
        closeL2(&placement)
        let host = allocateCluster(&placement)
        l1.appendZeros(upTo: Int(index) + 1)
        l1[Int(index)] = UInt64(host.bytes) | Qcow2Entry.copied
        openL2 = (index, host, Array(repeating: 0, count: Int(clusterSize / 8)))
    }

    private mutating func closeL2(_ placement: inout Placement) {
        guard let done = openL2 else { return }
        placement.append(.metadata(done.entries.bigEndianBytes), at: done.host.bytes)
        openL2 = nil
    }

    // MARK: Allocation

    private mutating func allocateCluster(_ placement: inout Placement) -> HostOffset {
        if nextCluster % clustersPerBlock == 0 {
            openRefcountBlock(at: HostOffset(nextCluster * clusterSize), &placement)
            refcounts[0] = 1
            nextCluster += 1
        }
        let cluster = nextCluster
        refcounts[Int(cluster % clustersPerBlock)] = 1
        nextCluster += 1
        return HostOffset(cluster * clusterSize)
    }

    private mutating func openRefcountBlock(
        at host: HostOffset, _ placement: inout Placement
    ) {
        closeRefcountBlock(&placement)
        refcountTable.append(UInt64(host.bytes))
        refcounts = RefcountBlock(bits: refcounts.bits, byteCount: Int(clusterSize))
        // A stream added to a cluster of the range before would have to be counted there.
        compressedEnd = nil
    }

    private func closeRefcountBlock(_ placement: inout Placement) {
        guard let host = refcountTable.last else { return }
        placement.append(.metadata(refcounts.bytes), at: Int64(host))
    }

    /// Finds room for a compressed cluster as qemu does: behind the last one, across the end of its
    /// host cluster if the next one is free, or else in a new one.
    private mutating func allocateBytes(
        _ count: Int64, _ placement: inout Placement
    ) -> HostOffset {
        if let end = compressedEnd {
            let edge = end.bytes.roundedUp(to: clusterSize)
            let shared = Int(end.bytes / clusterSize % clustersPerBlock)
            if refcounts[shared] < refcounts.maximum {
                if edge - end.bytes >= count {
                    refcounts[shared] += 1
                    return setCompressedEnd(behind: end, count)
                }
                if nextCluster * clusterSize == edge, nextCluster % clustersPerBlock != 0 {
                    refcounts[shared] += 1
                    _ = allocateCluster(&placement)
                    return setCompressedEnd(behind: end, count)
                }
            }
        }
        return setCompressedEnd(behind: allocateCluster(&placement), count)
    }

    private mutating func setCompressedEnd(
        behind start: HostOffset, _ count: Int64
    ) -> HostOffset {
        let end = start + count
        compressedEnd = end.bytes % clusterSize == 0 ? nil : end
        return start
    }

    // MARK: The end

    struct Ending {
        var placement: Placement
        /// Place of the LUKS header; nil if the image is not encrypted.
        var encryptionHeader: Qcow2Header.TableRange?
        var l1Offset: HostOffset
        var refcountTableOffset: HostOffset
        var refcountTableClusters: Int64
        /// The size of the file in bytes.
        var end: HostOffset
    }

    /// Places the open tables, then the LUKS header, the L1 table, the refcount table and the
    /// blocks that count these.
    ///
    /// - Parameters:
    ///   - l1Entries: number of entries of the L1 table.
    ///   - volume: nil if the image is not encrypted.
    /// - Throws: `ImageError` if the image has grown beyond what a refcount table can count.
    mutating func finish(
        l1Entries: Int64, _ volume: LUKSVolume? = nil
    ) throws(ImageError) -> Ending {
        l1.appendZeros(upTo: Int(l1Entries))
        try MemoryMargin.check(for: 2 * 8 * (l1.count + refcountTable.count))
        var placement = Placement()
        stream.close(&placement)
        closeL2(&placement)
        let start = nextCluster
        let luksClusters = (volume?.length ?? 0).dividedUp(by: clusterSize)
        let l1Clusters = (Int64(l1.count) * 8).dividedUp(by: clusterSize)
        let others = start - Int64(refcountTable.count) + luksClusters + l1Clusters
        let size = RefcountMetadataSize(
            counting: others, clusterSize: clusterSize, refcountBits: refcounts.bits)
        let tableClusters = size.tableClusters
        let end = others + size.total
        guard tableClusters * clusterSize <= Self.maximumRefcountTable else {
            throw .invalid("the image grows too large for clusters of \(clusterSize) bytes")
        }
        let l1Offset = HostOffset((start + luksClusters) * clusterSize)
        let tableOffset = l1Offset + l1Clusters * clusterSize
        placeTail(start..<end, blocksAt: tableOffset + tableClusters * clusterSize, &placement)
        if let volume {
            var bytes = volume.bytes
            bytes.appendZeros(upTo: Int(luksClusters * clusterSize))
            placement.append(.metadata(bytes), at: start * clusterSize)
        }
        placement.append(.metadata(padded(l1, l1Clusters)), at: l1Offset.bytes)
        placement.append(.metadata(padded(refcountTable, tableClusters)), at: tableOffset.bytes)
        return Ending(
            placement: placement,
            encryptionHeader: volume.map {
                Qcow2Header.TableRange(
                    offset: UInt64(start * clusterSize), length: UInt64($0.length))
            }, l1Offset: l1Offset, refcountTableOffset: tableOffset,
            refcountTableClusters: tableClusters, end: HostOffset(end * clusterSize))
    }

    /// Counts the clusters of the tail in the open block and in new ones.
    private mutating func placeTail(
        _ clusters: Range<Int64>, blocksAt firstBlock: HostOffset, _ placement: inout Placement
    ) {
        var nextBlock = firstBlock
        for cluster in clusters {
            let index = Int(cluster % clustersPerBlock)
            if index == 0 {
                openRefcountBlock(at: nextBlock, &placement)
                nextBlock = nextBlock + clusterSize
            }
            refcounts[index] = 1
        }
        closeRefcountBlock(&placement)
    }

    private func padded(_ table: [UInt64], _ clusters: Int64) -> [UInt8] {
        var bytes = table.bigEndianBytes
        bytes.appendZeros(upTo: Int(clusters * clusterSize))
        return bytes
    }
}
