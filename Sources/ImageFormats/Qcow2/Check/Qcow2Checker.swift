import Concurrency
import DiskImage
import Glibc
import ImageStorage

/// Checks qcow2 images: whether the refcounts equal the numbers of references in the tables, and
/// whether the tables are sound.
///
/// Messages about single clusters have qemu-img's words, because programs parse them. All come in
/// the order of the tables.
public struct Qcow2ImageChecker: ImageChecker {
    public init() {}

    public func check(
        _ storage: any Storage, onMessage: @escaping @Sendable (String) -> Void
    ) async throws -> CheckResult {
        try await IOExecutor.run {
            try await Qcow2Checker(.examining(storage), repair: nil, onMessage: onMessage).run()
        }
    }

    public func repair(
        _ storage: any WritableStorage, _ repair: CheckRepair,
        onMessage: @escaping @Sendable (String) -> Void
    ) async throws -> CheckResult {
        try await IOExecutor.run {
            try await Qcow2Checker(.damaged(storage), repair: repair, onMessage: onMessage).run()
        }
    }
}

/// One run of a check. Used by one task; child tasks get copies of what they need.
final class Qcow2Checker {
    var image: Qcow2WritableImage
    /// nil if nothing is to be repaired.
    let repair: CheckRepair?
    /// Whether damage to the list of snapshots is overlooked: the list is to be written anew.
    let mendsSnapshots: Bool
    private let onMessage: @Sendable (String) -> Void

    var result = CheckResult()
    var snapshots: [Qcow2Snapshot] = []
    /// Length of the snapshot table in bytes.
    var snapshotTableSize: UInt64 = 0
    /// Whether entries of the list of snapshots differ from those in the file.
    var needsNewList = false
    /// Damage to refcounts and tables found so far.
    var damage = DamageCounts()
    var counts: ReferenceCounts
    /// Length of the file in bytes, in whole sectors as qemu counts them.
    var fileSize: Int64
    private(set) var refcounts: RefcountReader
    /// Indices of the clusters that hold refcount blocks.
    private(set) var blockClusters: Set<UInt64> = []
    /// Whether refcounts cannot be repaired one by one, because a refcount block or the table is
    /// damaged or missing.
    var needsRebuild = false
    var needsCopiedPass = false
    var lastUsedCluster = 0
    /// Clusters that a damaged refcount table names. A repair must not write to them before it is
    /// done.
    var doubtfulClusters: Set<Int> = []
    /// Clusters with more references than a refcount of the image can hold.
    var overflows: Set<Int> = []
    /// Clusters behind the end of the file that tables name, collected for a full repair, which
    /// must not place anything new there.
    var outside: [Range<UInt64>] = []
    /// Repairs of table entries, written when everything has been checked.
    var pendingRepairs: [EntryRepair] = []
    /// Whether entries are to be repaired where possible: at the first count of a full repair.
    var repairsEntries: Bool
    /// Number of times that L1 tables name each L2 table with several references; nil until needed.
    var sharedTables: [Int: UInt64]?
    var hasReportedUnalignedBlock = false
    /// Whether findings are not reported, because they have been reported before.
    var isSilent = false

    /// Number of bytes of tables that a child task reads and counts at a time, unless reading
    /// waits.
    private static let batchSize: Int64 = 256 << 10
    /// Number of batches in flight. A few suffice for work, although a batch may wait for its turn;
    /// where reading waits, there are as many as easily fit into memory.
    var batchesInFlight: Int { storage.readMeter.isWaiting ? 64 : 4 }
    /// Number of runs that are counted per check of the memory. Each run can cost a chunk of the
    /// counts, a long one more.
    private static let runsPerMargin = 1024
    /// Number of bytes of tables that are read per check of the memory.
    private static let bytesPerMargin: Int64 = 64 << 10
    /// Largest number of clusters that qemu checks.
    private static let maximumClusters = Int64(Int32.max)

    /// - Parameters:
    ///   - image: open for writing if there is something to repair.
    ///   - mendsSnapshots: whether the list of snapshots is to be written anew, damaged or not.
    /// - Throws: `ImageError` if the image is too large to be checked.
    init(
        _ image: Qcow2WritableImage, repair: CheckRepair?, mendsSnapshots: Bool = false,
        onMessage: @escaping @Sendable (String) -> Void
    ) throws {
        let (storage, header) = (image.storage, image.header)
        self.image = image
        self.repair = repair
        repairsEntries = repair == .all
        self.mendsSnapshots = mendsSnapshots || repair == .all
        self.onMessage = onMessage
        fileSize = storage.size.roundedUp(to: guestSectorSize)
        let clusters = fileSize.dividedUp(by: header.geometry.clusterSize)
        guard clusters <= Self.maximumClusters else {
            throw ImageError.checkFailed(EFBIG)
        }
        try MemoryMargin.check()
        counts = ReferenceCounts(clusterCount: Int(clusters), refcountBits: header.refcountBits)
        refcounts = RefcountReader(storage, header)
    }

    var storage: any Storage { image.storage }
    var header: Qcow2Header { image.header }
    /// The entries up to the end of the file, behind which all read as zeros.
    var l1: [UInt64] { image.l1 }
    var clusterSize: Int64 { header.geometry.clusterSize }

    func run() async throws -> CheckResult {
        result.totalClusters = header.geometry.virtualSize.dividedUp(by: clusterSize)
        let damagedSnapshots = try await readSnapshots()
        try await checkRefcounts()
        result.add(damage)
        if !mendsSnapshots {
            result.corruptions += damagedSnapshots
        } else if repair != nil, damagedSnapshots > 0 {
            try await mendSnapshots(damagedSnapshots)
        }
        if repair != nil, result.checkErrors == 0, result.corruptions == 0 {
            try await markClean()
        }
        if repair != nil { try await image.writable.flush() }
        return result
    }

    private func checkRefcounts() async throws {
        try await readRefcountTable()
        try await countReferences()
        let counted = damage
        try await compareRefcounts(repair: nil)
        if repair != nil { try await mend(counted) }
        if needsCopiedPass || repair != nil { try await checkCopiedFlags() }
        result.imageEndOffset = Int64(lastUsedCluster + 1) * clusterSize
    }

    func say(_ text: String) { if !isSilent { onMessage(text) } }

    func reportCorruption(_ text: String) {
        damage.corruptions += 1
        say(text)
    }

    func readRefcountTable() async throws {
        refcounts = try await RefcountReader(reading: storage, header)
        blockClusters = Set(
            refcounts.table.indices.lazy.map(refcounts.blockOffset).filter { $0 != 0 }
                .map { $0 / UInt64(self.clusterSize) })
    }
}

// Counting the references to each cluster.
extension Qcow2Checker {
    func countReferences() async throws {
        result.allocatedClusters = 0
        result.fragmentedClusters = 0
        result.compressedClusters = 0
        try count { $0.addRegion(offset: 0, size: UInt64(clusterSize)) }
        try await countTables(
            l1, at: UInt64(header.l1Offset.bytes), entries: header.l1Entries, isActive: true)
        try await countSnapshots()
        try count {
            $0.addRegion(
                offset: UInt64(header.refcountTableOffset.bytes),
                size: UInt64(header.refcountTableClusters * clusterSize))
        }
        if let range = header.encryptionHeader {
            try count { $0.addRegion(offset: range.offset, size: range.length) }
        }
        try await countBitmaps()
        try countRefcountBlocks()
    }

    func collectorContext(isActive: Bool) -> ReferenceCollector.Context {
        ReferenceCollector.Context(
            geometry: header.geometry, hasDataFile: header.hasDataFile, fileSize: fileSize,
            isActive: isActive, repairs: repairsEntries)
    }

    func count(_ collect: (inout ReferenceCollector) -> Void) throws {
        var collector = ReferenceCollector(collectorContext(isActive: false))
        collect(&collector)
        try apply(collector.references)
    }

    /// Counts the references of an L1 table and of the L2 tables that it names, which are read and
    /// decoded concurrently.
    ///
    /// - Parameters:
    ///   - l1: the entries that the file has.
    ///   - entries: number of entries that the table should have.
    func countTables(
        _ l1: [UInt64], at offset: UInt64, entries: Int64, isActive: Bool
    ) async throws {
        guard entries > 0 else { return }
        try count { $0.addRegion(offset: offset, size: UInt64(entries) * 8) }
        let context = collectorContext(isActive: isActive)
        let tablesPerBatch = Int(max(1, Self.batchSize / clusterSize))
        try await inOrder(
            L1Batches(l1, tablesPerBatch: tablesPerBatch, meter: storage.readMeter),
            width: batchesInFlight
        ) { [storage] batch in
            try Task.checkCancellation()
            return try await Self.collect(batch, from: storage, context)
        } use: {
            try self.apply($0)
        }
    }

    private static func collect(
        _ l1: [UInt64], from storage: any Storage, _ context: ReferenceCollector.Context
    ) async throws -> ClusterReferences {
        let clusterSize = context.geometry.clusterSize
        var collector = ReferenceCollector(context)
        var buffer = try IOBuffer(byteCount: Int(clusterSize))
        let tablesPerMargin = Int(max(1, bytesPerMargin / clusterSize))
        for (number, entry) in l1.enumerated() {
            // Each entry can cause a message, which takes memory.
            if number % tablesPerMargin == 0 { try MemoryMargin.check() }
            guard let offset = collector.addL1Entry(entry) else { continue }
            // A table that is cut short continues with zeros.
            let count = try await storage.readAvailable(into: &buffer, at: offset)
            guard count > 0 else { continue }
            collector.addL2Table(buffer.bytes, at: offset)
        }
        return collector.references
    }

    private func apply(_ references: ClusterReferences) throws {
        if references.needsCopiedPass { needsCopiedPass = true }
        if repair == .all { outside += references.outside }
        result.allocatedClusters += references.allocatedClusters
        result.fragmentedClusters += references.fragmentedClusters
        result.compressedClusters += references.compressedClusters
        var position = 0
        for finding in references.findings {
            try apply(references.runs[position..<finding.position])
            apply(finding)
            position = finding.position
        }
        try apply(references.runs[position...])
    }

    private func apply(_ runs: ArraySlice<ClusterRun>) throws {
        var rest = runs
        while !rest.isEmpty {
            let part = rest.prefix(Self.runsPerMargin)
            let clusters = part.reduce(0) { $0 + $1.count }
            try MemoryMargin.check(for: clusters * ReferenceCounts.bytesPerCount)
            counts.add(part) { reportOverflow($0) }
            rest = rest.dropFirst(part.count)
        }
    }

    private func reportOverflow(_ cluster: Int) {
        overflows.insert(cluster)
        reportCorruption(
            "ERROR: overflow cluster offset=0x" + (Int64(cluster) * clusterSize).hexadecimal)
        say(
            "Use qemu-img amend to increase the refcount entry width or qemu-img convert "
                + "to create a clean copy if the image cannot be opened for writing")
    }

    private func apply(_ finding: CheckFinding) {
        say(finding.text)
        damage.corruptions += 1
        guard let repair = finding.repair, !isOtherMetadata(repair.offset) else { return }
        pendingRepairs.append(repair)
        damage.corruptions -= 1
        damage.corruptionsFixed += 1
    }

    /// Counts the refcount blocks. Each has one reference, from the refcount table.
    private func countRefcountBlocks() throws {
        doubtfulClusters = []
        for (index, entry) in refcounts.table.enumerated() where entry != 0 {
            let offset = refcounts.blockOffset(index)
            let cluster = Int(offset >> UInt64(header.geometry.clusterBits))
            if entry != offset {
                needsRebuild = true
                doubtfulClusters.insert(cluster)
                reportCorruption("ERROR refcount table entry \(index) has reserved bits set")
                continue
            }
            if offset % UInt64(clusterSize) != 0 {
                needsRebuild = true
                doubtfulClusters.formUnion([cluster, cluster + 1])
                reportCorruption(
                    "ERROR refcount block \(index) is not cluster aligned; refcount table entry "
                        + "corrupted")
                continue
            }
            guard cluster < counts.clusterCount else {
                if repairsEntries { needsRebuild = true }
                outside.append(UInt64(cluster)..<UInt64(cluster) + 1)
                reportCorruption("ERROR refcount block \(index) is outside image")
                continue
            }
            try count { $0.addRegion(offset: offset, size: UInt64(clusterSize)) }
            let references = counts[cluster]
            guard references != 1 else { continue }
            needsRebuild = true
            reportCorruption("ERROR refcount block \(index) refcount=\(references)")
        }
    }
}

extension ImageError {
    /// The error for a check that could not be completed, in qemu-img's words.
    static func checkFailed(_ code: Int32) -> ImageError {
        ImageError(.system(errno: code), "Check failed: \(String(cString: strerror(code)))")
    }
}
