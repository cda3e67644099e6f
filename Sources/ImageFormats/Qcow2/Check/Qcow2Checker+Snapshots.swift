import DiskImage
import Glibc
import ImageStorage

/// The snapshot table, as far as a check needs it.
struct Snapshots: Sendable {
    struct Entry: Sendable {
        var id: String
        var name: String
        var l1Offset: UInt64
        var l1Entries: UInt32
    }

    var entries: [Entry] = []
    /// In bytes.
    var tableSize: UInt64 = 0
    var damage = DamageCounts()
}

// Source: QEMU's docs/interop/qcow2.txt, section "Snapshots".
extension Qcow2Checker {
    /// qemu's limits.
    private static let maximumSnapshots: UInt32 = 65536
    private static let maximumExtraData: UInt32 = 1024
    /// 1024 bytes for each, in bytes.
    private static let maximumSnapshotTable: UInt64 = 64 << 20
    private static let snapshotEntryHeader = 40
    /// What version 3 wants in each entry: the large size of the machine's state and the disk's size.
    private static let neededExtraData: UInt32 = 16

    func readSnapshots() async throws -> Snapshots {
        var snapshots = Snapshots()
        guard header.snapshotCount <= Self.maximumSnapshots else {
            say("ERROR snapshot table too large")
            throw ImageError.checkFailed(EFBIG)
        }
        guard header.snapshotTableOffset % UInt64(clusterSize) == 0,
            header.snapshotTableOffset <= UInt64(Int64.max) - Self.maximumSnapshotTable
        else {
            say("ERROR snapshot table offset invalid")
            throw ImageError.checkFailed(EINVAL)
        }
        let start = header.snapshotTableOffset
        var position = start
        for index in 0..<header.snapshotCount {
            position = try await readSnapshot(index, at: position, &snapshots)
            guard position - start <= Self.maximumSnapshotTable else {
                say("ERROR failed to read the snapshot table: Snapshot table is too big")
                throw ImageError.checkFailed(EFBIG)
            }
        }
        snapshots.tableSize = position - start
        return snapshots
    }

    /// - Returns: where the next entry may begin.
    private func readSnapshot(
        _ index: UInt32, at place: UInt64, _ snapshots: inout Snapshots
    ) async throws -> UInt64 {
        let start = place.roundedUp(to: 8)
        try MemoryMargin.check()
        var fixed = try IOBuffer(byteCount: Self.snapshotEntryHeader)
        _ = try await storage.readAvailable(into: &fixed, at: Int64(start))
        let bytes = fixed.bytes
        let idLength = Int(bytes.bigEndian(at: 12, as: UInt16.self))
        let nameLength = Int(bytes.bigEndian(at: 14, as: UInt16.self))
        let extraLength = bytes.bigEndian(at: 36, as: UInt32.self)
        guard extraLength <= Self.maximumExtraData else {
            say(
                "ERROR failed to read the snapshot table: Too much extra metadata in snapshot "
                    + "table entry \(index)")
            throw ImageError.checkFailed(EINVAL)
        }
        if header.version >= 3, extraLength < Self.neededExtraData {
            snapshots.damage.corruptions += 1
            say("ERROR snapshot table entry \(index) is incomplete")
        }
        let texts = start + UInt64(Self.snapshotEntryHeader) + UInt64(extraLength)
        var names = try IOBuffer(byteCount: idLength + nameLength)
        _ = try await storage.readAvailable(into: &names, at: Int64(texts))
        snapshots.entries.append(
            Snapshots.Entry(
                id: names.bytes.text(0..<idLength),
                name: names.bytes.text(idLength..<idLength + nameLength),
                l1Offset: bytes.bigEndian(at: 0, as: UInt64.self),
                l1Entries: bytes.bigEndian(at: 8, as: UInt32.self)))
        return texts + UInt64(idLength + nameLength)
    }

    func countSnapshots(_ snapshots: Snapshots, repairs: Bool) async throws {
        if header.hasDataFile, !snapshots.entries.isEmpty {
            reportCorruption("ERROR \(snapshots.entries.count) snapshots in image with data file")
        }
        for entry in snapshots.entries { try await count(entry, repairs: repairs) }
        try await count {
            $0.addRegion(offset: header.snapshotTableOffset, size: snapshots.tableSize)
        }
    }

    private func count(_ entry: Snapshots.Entry, repairs: Bool) async throws {
        let title = "ERROR snapshot \(entry.id) (\(entry.name))"
        guard entry.l1Offset % UInt64(clusterSize) == 0 else {
            return reportCorruption(
                "\(title) l1_offset=0x\(hexadecimal(entry.l1Offset)): L1 table is not cluster "
                    + "aligned; snapshot table entry corrupted")
        }
        guard entry.l1Entries <= Qcow2Header.maximumL1Entries else {
            return reportCorruption(
                "\(title) l1_size=0x\(hexadecimal(entry.l1Entries)): L1 table is too large; "
                    + "snapshot table entry corrupted")
        }
        try await countTables(
            try await readL1(of: entry), at: entry.l1Offset, entries: Int64(entry.l1Entries),
            isActive: false,
            repairs: repairs)
    }

    /// As much of a snapshot's L1 table as there is, if it can be one.
    func readL1(of entry: Snapshots.Entry) async throws -> [UInt64] {
        guard let offset = Int64(exactly: entry.l1Offset), offset < storage.size,
            offset % clusterSize == 0, entry.l1Entries <= Qcow2Header.maximumL1Entries
        else { return [] }
        return try await storage.readWords(at: offset, count: Int64(entry.l1Entries))
    }
}

extension RawSpan {
    /// Text that a stranger has written, for a terminal: without control characters.
    fileprivate func text(_ range: Range<Int>) -> String {
        let text = extracting(range).withUnsafeBytes { String(decoding: $0, as: UTF8.self) }
        return String(
            String.UnicodeScalarView(
                text.unicodeScalars.map {
                    $0.properties.generalCategory == .control ? "?" : $0
                }))
    }
}
