import DiskImage
import Glibc
import ImageStorage

// Source: QEMU's docs/interop/qcow2.txt, section "Snapshots".
extension Qcow2Checker {
    /// Limit of the table in bytes: 1024 for each snapshot, as in qemu.
    private static let maximumSnapshotTable: Int64 = 64 << 20
    /// Number of bytes that no entry exceeds.
    private static let longestEntry: Int64 = 256 << 10
    /// Length in bytes of the extra data that version 3 requires in each entry: the 64-bit size of
    /// the machine state and the size of the disk.
    private static let neededExtraData = 16

    /// - Returns: number of incomplete entries.
    func readSnapshots() async throws -> Int64 {
        var incomplete: Int64 = 0
        guard header.snapshotCount <= Qcow2Snapshot.maximumCount else {
            say("ERROR snapshot table too large")
            throw ImageError.checkFailed(EFBIG)
        }
        guard header.snapshotTableOffset % UInt64(clusterSize) == 0,
            header.snapshotTableOffset <= UInt64(Int64.max / 2)
        else {
            say("ERROR snapshot table offset invalid")
            throw ImageError.checkFailed(EINVAL)
        }
        var cursor = try MetadataCursor(
            storage, "snapshot table", at: header.snapshotTableOffset,
            maximum: Self.maximumSnapshotTable + Self.longestEntry, isTolerant: true)
        let start = cursor.position
        for index in 0..<header.snapshotCount {
            try MemoryMargin.check()
            do {
                snapshots.append(try await Qcow2Snapshot.next(&cursor))
            } catch is Qcow2Snapshot.TooMuchExtraData {
                say(
                    "ERROR failed to read the snapshot table: Too much extra metadata in snapshot "
                        + "table entry \(index)")
                throw ImageError.checkFailed(EINVAL)
            }
            if header.version >= 3, snapshots[Int(index)].extraLength < Self.neededExtraData {
                incomplete += 1
                say("ERROR snapshot table entry \(index) is incomplete")
            }
            guard cursor.position - start <= Self.maximumSnapshotTable else {
                say("ERROR failed to read the snapshot table: Snapshot table is too big")
                throw ImageError.checkFailed(EFBIG)
            }
        }
        snapshotTableSize = UInt64(cursor.position - start)
        return incomplete
    }

    func countSnapshots() async throws {
        if header.hasDataFile, !snapshots.isEmpty {
            reportCorruption("ERROR \(snapshots.count) snapshots in image with data file")
        }
        for snapshot in snapshots { try await count(snapshot) }
        try count { $0.addRegion(offset: header.snapshotTableOffset, size: snapshotTableSize) }
    }

    private func count(_ entry: Qcow2Snapshot) async throws {
        // A stranger may have written the texts, and they go to a terminal.
        let title =
            "ERROR snapshot \(entry.id.text) (\(entry.name.text))".withoutControlCharacters
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
            try await readL1(of: entry), at: entry.l1Offset, entries: entry.l1Entries,
            isActive: false)
    }

    /// Reads a snapshot's L1 table as far as the file has it; empty if its place or length is
    /// invalid.
    func readL1(of entry: Qcow2Snapshot) async throws -> [UInt64] {
        guard let offset = Int64(exactly: entry.l1Offset), offset < storage.size,
            offset % clusterSize == 0, entry.l1Entries <= Qcow2Header.maximumL1Entries
        else { return [] }
        return try await storage.readWords(at: offset, count: entry.l1Entries)
    }
}
