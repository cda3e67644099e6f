import Concurrency
import DiskImage
import Glibc
import ImageStorage

/// Checks a qcow2 image: whether its refcounts are what its tables refer to, and the tables sound.
///
/// Messages about single clusters have qemu-img's words, because programs read them.
public struct Qcow2Check: Sendable {
    private let storage: any Storage
    private let repair: Qcow2Checker.Repair?
    private let onMessage: @Sendable (String) -> Void

    /// - Parameter onMessage: told of each finding, one line each, in the order of the tables.
    public init(
        _ storage: any Storage, onMessage: @escaping @Sendable (String) -> Void
    ) {
        self.storage = storage
        repair = nil
        self.onMessage = onMessage
    }

    /// A check that puts right what it can.
    public init(
        repairing storage: any WritableStorage, _ repair: CheckRepair,
        onMessage: @escaping @Sendable (String) -> Void
    ) {
        self.storage = storage
        self.repair = Qcow2Checker.Repair(what: repair, storage: storage)
        self.onMessage = onMessage
    }

    /// - Throws: `ImageError` where the image cannot be read or written, is no qcow2 image, or is
    ///   damaged so that the check cannot go on.
    public func run() async throws -> CheckResult {
        try await IOExecutor.run {
            let header = try await Qcow2Header.read(from: storage, for: .checking)
            let checker = try await Qcow2Checker(
                storage, header, repair: repair, onMessage: onMessage)
            return try await checker.run()
        }
    }
}

/// One run of a check. Used by one task; what it gives to child tasks is copied.
final class Qcow2Checker {
    /// The repairs to make, and the storage to make them on.
    struct Repair {
        var what: CheckRepair
        var storage: any WritableStorage
    }

    let storage: any Storage
    var header: Qcow2Header
    private let mending: Repair?
    var repair: CheckRepair? { mending?.what }
    private let onMessage: @Sendable (String) -> Void

    var result = CheckResult()
    /// What has been found about refcounts and tables so far.
    var damage = DamageCounts()
    var counts: ReferenceCounts
    /// In bytes.
    var fileSize: Int64
    /// Up to the end of the file; what would lie behind reads as zeros.
    var l1: [UInt64]
    private(set) var refcounts: RefcountReader
    /// The clusters of the refcount blocks.
    private(set) var blockClusters: Set<UInt64> = []
    /// Refcounts cannot be put right one by one: a block or the table is damaged or missing.
    var needsRebuild = false
    var needsCopiedPass = false
    var lastUsedCluster = 0
    /// Clusters that a damaged refcount table names: a repair must not write there before it is
    /// done.
    var doubtfulClusters: Set<Int> = []
    /// Clusters with more references than a refcount of the image can be.
    var overflows: Set<Int> = []
    /// Clusters that are named and lie behind the end of the file, if there is to be a repair: what
    /// is new must not go there.
    var outside: [Range<UInt64>] = []
    /// Repairs of table entries: written when all that there is has been looked at.
    var pendingRepairs: [(offset: Int64, words: [UInt64])] = []
    /// The number of times that L1 tables name each L2 table with several references; found out
    /// when needed.
    var sharedTables: [Int: UInt64]?
    var hasReportedUnalignedBlock = false
    /// Findings are not told: they have been told before.
    var isSilent = false

    /// A child task reads and counts so much at a time, in bytes; where reading waits, one table.
    private static let batchSize: Int64 = 256 << 10
    /// More than cores, for a batch may wait for its turn; and where reading waits, as many as
    /// memory is easily there for.
    var batchesInFlight: Int { storage.readMeter.isWaiting ? 64 : 4 }
    /// Each can cost a chunk of the counts, long ones more.
    private static let runsPerMargin = 1024
    /// The bytes of tables that are read before memory is asked for again.
    private static let bytesPerMargin: Int64 = 64 << 10
    /// What qemu checks at most, in clusters.
    private static let maximumClusters = Int64(Int32.max)

    init(
        _ storage: any Storage, _ header: Qcow2Header, repair: Repair?,
        onMessage: @escaping @Sendable (String) -> Void
    ) async throws {
        self.storage = storage
        self.header = header
        mending = repair
        self.onMessage = onMessage
        // Whole sectors, as qemu counts them.
        fileSize = storage.size.roundedUp(to: guestSectorSize)
        let clusters = fileSize.dividedUp(by: header.geometry.clusterSize)
        guard clusters <= Self.maximumClusters else {
            throw ImageError.checkFailed(EFBIG)
        }
        try MemoryMargin.check()
        counts = ReferenceCounts(clusterCount: Int(clusters), refcountBits: header.refcountBits)
        refcounts = RefcountReader(storage, header, table: [])
        l1 = try await storage.readWords(at: header.l1Offset.bytes, count: header.l1Entries)
    }

    /// - Throws: `ImageError` in a check that repairs nothing.
    var writable: any WritableStorage {
        get throws(ImageError) {
            guard let mending else { throw .unsupported(storage.name, "is open for reading only") }
            return mending.storage
        }
    }

    var clusterSize: Int64 { header.geometry.clusterSize }

    func run() async throws -> CheckResult {
        result.totalClusters = header.geometry.virtualSize.dividedUp(by: clusterSize)
        let snapshots = try await readSnapshots()
        try await checkRefcounts(snapshots)
        result.add(damage)
        result.add(snapshots.damage)
        if repair != nil, result.checkErrors == 0, result.corruptions == 0 {
            try await markClean()
        }
        return result
    }

    private func checkRefcounts(_ snapshots: Snapshots) async throws {
        try await readRefcountTable()
        try await countReferences(snapshots, repairs: repair == .all)
        let counted = damage
        try await compareRefcounts(repair: nil)
        if let repair { try await mend(repair, snapshots, counted) }
        if needsCopiedPass || repair != nil { try await checkCopiedFlags(snapshots) }
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

// Counting what refers to each cluster.
extension Qcow2Checker {
    func countReferences(_ snapshots: Snapshots, repairs: Bool) async throws {
        result.allocatedClusters = 0
        result.fragmentedClusters = 0
        result.compressedClusters = 0
        try await count { $0.addRegion(offset: 0, size: UInt64(clusterSize)) }
        try await countTables(
            l1, at: UInt64(header.l1Offset.bytes), entries: header.l1Entries, isActive: true,
            repairs: repairs)
        try await countSnapshots(snapshots, repairs: repairs)
        try await count {
            $0.addRegion(
                offset: UInt64(header.refcountTableOffset.bytes),
                size: UInt64(header.refcountTableClusters * clusterSize))
        }
        if let range = header.encryptionHeader {
            try await count { $0.addRegion(offset: range.offset, size: range.length) }
        }
        try await countBitmaps()
        try await countRefcountBlocks(repairs: repairs)
    }

    func collectorContext(isActive: Bool, repairs: Bool) -> ReferenceCollector.Context {
        ReferenceCollector.Context(
            geometry: header.geometry, hasDataFile: header.hasDataFile, fileSize: fileSize,
            isActive: isActive, repairs: repairs)
    }

    func count(_ collect: (inout ReferenceCollector) -> Void) async throws {
        var collector = ReferenceCollector(collectorContext(isActive: false, repairs: false))
        collect(&collector)
        try apply(collector.references)
    }

    /// Counts an L1 table and the L2 tables that it names: these are read and decoded beside each
    /// other.
    ///
    /// - Parameters:
    ///   - l1: as much of it as there is.
    ///   - entries: as many as it is said to have.
    func countTables(
        _ l1: [UInt64], at offset: UInt64, entries: Int64, isActive: Bool, repairs: Bool
    ) async throws {
        guard entries > 0 else { return }
        try await count { $0.addRegion(offset: offset, size: UInt64(entries) * 8) }
        let context = collectorContext(isActive: isActive, repairs: repairs)
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
            // Each entry can bring a message.
            if number % tablesPerMargin == 0 { try MemoryMargin.check() }
            guard let offset = collector.addL1Entry(entry) else { continue }
            // Whatever lies there: a table that is cut short goes on with zeros.
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
            "ERROR: overflow cluster offset=0x" + hexadecimal(Int64(cluster) * clusterSize))
        say(
            "Use qemu-img amend to increase the refcount entry width or qemu-img convert "
                + "to create a clean copy if the image cannot be opened for writing")
    }

    private func apply(_ finding: CheckFinding) {
        say(finding.text)
        damage.corruptions += 1
        guard case .repairable(let offset, let words) = finding.severity,
            !isOtherMetadata(offset)
        else { return }
        pendingRepairs.append((offset, words))
        damage.corruptions -= 1
        damage.corruptionsFixed += 1
    }

    /// Refcount blocks have one reference each, from the refcount table.
    private func countRefcountBlocks(repairs: Bool) async throws {
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
                if repairs { needsRebuild = true }
                outside.append(UInt64(cluster)..<UInt64(cluster) + 1)
                reportCorruption("ERROR refcount block \(index) is outside image")
                continue
            }
            try await count { $0.addRegion(offset: offset, size: UInt64(clusterSize)) }
            let references = counts[cluster]
            guard references != 1 else { continue }
            needsRebuild = true
            reportCorruption("ERROR refcount block \(index) refcount=\(references)")
        }
    }
}

extension ImageError {
    /// A check that could not be brought to an end, in the words that qemu-img has for it.
    static func checkFailed(_ code: Int32) -> ImageError {
        ImageError(.system(errno: code), "Check failed: \(String(cString: strerror(code)))")
    }
}
