import DiskImage

/// Finds out which host clusters the entries of tables refer to. Pure; no entry, however wrong,
/// ends the search.
///
/// Source: QEMU's docs/interop/qcow2.txt, sections "Cluster mapping", "L2 table entry" and
/// "Extended L2 entries".
struct ReferenceCollector: Sendable {
    struct Context: Sendable {
        var geometry: Qcow2Geometry
        var hasDataFile: Bool
        /// Length of the file in bytes, rounded up to a multiple of 512: a file that ends within a
        /// sector counts with the whole sector.
        var fileSize: Int64
        /// Whether the table belongs to the guest disk, not to a snapshot; OFLAG_COPIED means
        /// something only there.
        var isActive: Bool
        /// Whether table entries are repaired where possible.
        var repairs: Bool
    }

    private enum Reserved {
        static let l1: UInt64 = 0x7f00_0000_0000_01ff
        static let l2: UInt64 = 0x3f00_0000_0000_01fe
    }

    private(set) var references = ClusterReferences()
    private let context: Context
    private let clusterBits: Int64
    private let clusterSize: Int64
    /// Offset of the cluster that would follow the last data cluster of the L2 table; 0 before the
    /// first.
    private var expected: UInt64 = 0

    init(_ context: Context) {
        self.context = context
        clusterBits = Int64(context.geometry.clusterBits)
        clusterSize = context.geometry.clusterSize
    }

    /// Adds a reference to a range of the file, in bytes.
    mutating func addRegion(offset: UInt64, size: UInt64, mark: ReferenceMark = .none) {
        guard size > 0 else { return }
        let (end, overflow) = offset.addingReportingOverflow(size)
        // The last cluster of a file may be cut short.
        guard !overflow, end < UInt64(context.fileSize) + UInt64(clusterSize) else {
            references.outside.append(
                offset >> UInt64(clusterBits)..<((overflow ? .max : end) - 1) >> UInt64(clusterBits)
                    + 1)
            return references.report(
                "ERROR: counting reference for region exceeding the end of the file by one cluster "
                    + "or more: offset 0x\(offset.hexadecimal) size 0x\(size.hexadecimal)")
        }
        var first = Int(offset >> UInt64(clusterBits))
        let behind = Int((end - 1) >> UInt64(clusterBits)) + 1
        while first < behind {
            let count = min(behind - first, ClusterRun.maximumCount - 1)
            references.runs.append(ClusterRun(cluster: first, count: count, mark: mark))
            first += count
        }
    }

    /// Adds the reference of an L1 entry.
    ///
    /// - Returns: offset of the L2 table in bytes; nil if the entry is zero.
    mutating func addL1Entry(_ entry: UInt64) -> Int64? {
        guard entry != 0 else { return nil }
        if entry & Reserved.l1 != 0 {
            references.report(
                "ERROR found L1 entry with reserved bits set: \(entry.hexadecimal)")
        }
        let offset = entry & Qcow2Entry.offsetMask
        addRegion(offset: offset, size: UInt64(clusterSize), mark: mark(entry))
        if offset % UInt64(clusterSize) != 0 {
            references.report(
                "ERROR l2_offset=\(offset.hexadecimal): Table is not cluster aligned; "
                    + "L1 entry corrupted")
        }
        return Int64(offset)
    }

    /// Adds the references of an L2 table.
    ///
    /// - Parameters:
    ///   - bytes: the whole table.
    ///   - tableOffset: its offset in the file, in bytes.
    mutating func addL2Table(_ bytes: RawSpan, at tableOffset: Int64) {
        let isExtended = context.geometry.hasExtendedL2
        let entrySize = isExtended ? 16 : 8
        expected = 0
        var index = 0
        while index < bytes.byteCount / entrySize {
            let entry = bytes.bigEndian(at: index * entrySize, as: UInt64.self)
            let bitmap =
                isExtended ? bytes.bigEndian(at: index * entrySize + 8, as: UInt64.self) : 0
            if entry | bitmap == 0 {
                index += 1
            } else if isPlain(entry, bitmap) {
                let count = plainRun(bytes, from: index, entrySize)
                addPlainRun(entry, count)
                index += count
            } else {
                let place = tableOffset + Int64(index * entrySize)
                addEntry(entry, bitmap, index, place)
                index += 1
            }
        }
    }

    /// Whether an entry names an ordinary cluster in this file, with nothing to report.
    @inline(__always)
    private func isPlain(_ entry: UInt64, _ bitmap: UInt64) -> Bool {
        let extraordinary =
            ~(Qcow2Entry.copied | Qcow2Entry.offsetMask) | UInt64(clusterSize - 1)
        let offset = entry & Qcow2Entry.offsetMask
        return entry & extraordinary == 0 && offset != 0 && offset < UInt64(context.fileSize)
            && (bitmap >> 32) & bitmap == 0 && !context.hasDataFile
    }

    /// Number of plain entries from `first` on whose clusters follow each other.
    private func plainRun(_ bytes: RawSpan, from first: Int, _ entrySize: Int) -> Int {
        let step = UInt64(clusterSize)
        let fileSize = UInt64(context.fileSize)
        let isExtended = entrySize > 8
        var next = bytes.bigEndian(at: first * entrySize, as: UInt64.self)
        var position = first * entrySize
        while position < bytes.byteCount {
            guard bytes.bigEndian(at: position, as: UInt64.self) == next,
                next & Qcow2Entry.offsetMask < fileSize
            else { break }
            if isExtended {
                let bitmap = bytes.bigEndian(at: position + 8, as: UInt64.self)
                guard (bitmap >> 32) & bitmap == 0 else { break }
            }
            next += step
            position += entrySize
        }
        return position / entrySize - first
    }

    private mutating func addPlainRun(_ entry: UInt64, _ count: Int) {
        let offset = entry & Qcow2Entry.offsetMask
        countData(at: offset, count)
        references.runs.append(
            ClusterRun(
                cluster: Int(offset >> UInt64(clusterBits)), count: count, mark: mark(entry)))
    }

    private mutating func countData(at offset: UInt64, _ count: Int) {
        guard context.isActive else { return }
        references.allocatedClusters += Int64(count)
        if expected != 0, offset != expected { references.fragmentedClusters += 1 }
        expected = offset + UInt64(count) * UInt64(clusterSize)
    }

    private func mark(_ entry: UInt64) -> ReferenceMark {
        guard context.isActive else { return .none }
        return entry & Qcow2Entry.copied != 0 ? .copied : .shared
    }

    private mutating func addEntry(
        _ entry: UInt64, _ bitmap: UInt64, _ index: Int, _ place: Int64
    ) {
        if entry & Qcow2Entry.compressed != 0 { return addCompressed(entry, bitmap, index) }
        if entry & Reserved.l2 != 0 {
            references.report(
                "ERROR found l2 entry with reserved bits set: \(entry.hexadecimal)")
        }
        let offset = entry & Qcow2Entry.offsetMask
        let isZero = !context.geometry.hasExtendedL2 && entry & Qcow2Entry.zero != 0
        if offset == 0 {
            // The first cluster of a data file is at offset 0, so only the flag shows that it is
            // allocated.
            guard !isZero, context.hasDataFile, entry & Qcow2Entry.copied != 0 else {
                if bitmap & Qcow2Entry.allSubclustersAllocated != 0 {
                    references.report(
                        "ERROR: Unallocated cluster has non-zero subcluster allocation map")
                }
                return
            }
        }
        if (bitmap >> 32) & bitmap != 0 {
            references.report(
                "ERROR offset=\(offset.hexadecimal): Allocated cluster has corrupted subcluster "
                    + "allocation bitmap")
        }
        if offset % UInt64(clusterSize) != 0 {
            let holdsData =
                context.geometry.hasExtendedL2
                ? bitmap & Qcow2Entry.allSubclustersAllocated != 0 : !isZero
            if reportUnaligned(offset, bitmap, holdsData: holdsData, place) { return }
        }
        countData(at: offset, 1)
        if context.hasDataFile {
            // The clusters of a data file have no refcounts and count as used once.
            if entry & Qcow2Entry.copied == 0 { references.needsCopiedPass = true }
        } else {
            addRegion(offset: offset, size: UInt64(clusterSize), mark: mark(entry))
        }
    }

    /// Reports a cluster that does not begin at a multiple of the cluster size.
    ///
    /// - Returns: whether the entry will be repaired, so that it names no cluster any more.
    private mutating func reportUnaligned(
        _ offset: UInt64, _ bitmap: UInt64, holdsData: Bool, _ place: Int64
    ) -> Bool {
        guard !holdsData else {
            references.report(
                "ERROR offset=\(offset.hexadecimal): Data cluster is not properly aligned; "
                    + "L2 entry corrupted.")
            return false
        }
        let text =
            " offset=\(offset.hexadecimal): Preallocated cluster is not properly aligned; "
            + "L2 entry corrupted."
        guard context.repairs else {
            references.report("ERROR" + text)
            return false
        }
        // The repaired entry names no cluster but still reads as zeros; an extended entry keeps its
        // bitmap.
        let words = context.geometry.hasExtendedL2 ? [0, bitmap] : [Qcow2Entry.zero]
        references.report("Repairing" + text, repair: EntryRepair(offset: place, words: words))
        return true
    }

    private mutating func addCompressed(_ entry: UInt64, _ bitmap: UInt64, _ index: Int) {
        let stream = Qcow2CompressedCluster(entry: entry, context.geometry)
        let offset = UInt64(stream.host.bytes)
        if entry & Qcow2Entry.copied != 0 {
            references.report(
                "ERROR: coffset=0x\(offset.hexadecimal): copied flag must never be set for "
                    + "compressed clusters")
        }
        let plainEntry = (entry & ~Qcow2Entry.copied).hexadecimal
        if context.hasDataFile {
            return references.report(
                "ERROR compressed cluster \(index) with data file, entry=0x\(plainEntry)")
        }
        if bitmap != 0 {
            return references.report(
                "ERROR compressed cluster \(index) with non-zero subcluster allocation bitmap, "
                    + "entry=0x\(plainEntry)")
        }
        addRegion(offset: offset, size: UInt64(stream.maximumLength))
        guard context.isActive else { return }
        references.allocatedClusters += 1
        references.compressedClusters += 1
        // A stream can lie anywhere in a cluster, so it counts as the neighbour of none.
        references.fragmentedClusters += 1
    }
}
