import DiskImage
import Glibc
import ImageStorage

// Source: QEMU's docs/interop/qcow2.txt, section "Snapshots".
extension Qcow2Checker {
    /// Limit of the table in bytes: 1024 for each snapshot, as in qemu.
    private static let maximumSnapshotTable: Int64 = 64 << 20
    /// Number of bytes that no entry exceeds.
    private static let longestEntry: Int64 = 256 << 10

    /// Reads the list, or what a repair keeps of a damaged one: as in qemu, as many snapshots as
    /// programs accept, with as much extra data. Unlike qemu, entries behind one with too much of
    /// it must make sense: if that length is wrong, these snapshots would be lost.
    ///
    /// - Returns: number of damaged entries.
    /// - Throws: `ImageError` if the list cannot be read, or not be repaired.
    func readSnapshots() async throws -> Int64 {
        let maximum = Qcow2Snapshot.maximumCount
        let dropped = Int64(header.snapshotCount) - Int64(maximum)
        if dropped > 0 {
            try refuseUnlessMending("ERROR snapshot table too large")
            tellMending("Discarding \(dropped) overhanging snapshots")
        }
        var damaged = max(0, dropped)
        guard header.snapshotTableOffset % UInt64(clusterSize) == 0,
            header.snapshotTableOffset <= UInt64(Int64.max / 2)
        else {
            say("ERROR snapshot table offset invalid")
            throw ImageError.checkFailed(EINVAL)
        }
        var cursor = try MetadataCursor(
            storage, "snapshot table", at: header.snapshotTableOffset,
            maximum: Self.maximumSnapshotTable + Self.longestEntry + Int64(UInt32.max),
            isTolerant: true)
        let start = cursor.position
        var end = start
        var wasTooLong = false
        for index in 0..<min(header.snapshotCount, maximum) {
            try MemoryMargin.check()
            let isDoubtful = wasTooLong
            let entry = try await Qcow2Snapshot.next(&cursor) { length throws(ImageError) in
                try refuseUnlessMending(
                    "ERROR failed to read the snapshot table: Too much extra metadata in snapshot "
                        + "table entry \(index)")
                tellMending(
                    "Discarding too much extra metadata in snapshot table entry \(index) "
                        + "(\(length) > \(Qcow2Snapshot.maximumExtraData))")
                damaged += 1
                wasTooLong = true
            }
            let isBehind = cursor.position - start > Self.maximumSnapshotTable
            // An entry that is doubtful itself, or whose length hides all others.
            if isDoubtful ? !makesSense(entry) : wasTooLong && isBehind {
                say("ERROR snapshot table entry \(index) cannot be read")
                throw ImageError.checkFailed(EINVAL)
            }
            guard !isBehind else {
                try refuseUnlessMending(
                    "ERROR failed to read the snapshot table: Snapshot table is too big")
                let rest = min(header.snapshotCount, maximum) - index
                tellMending("Discarding \(rest) overhanging snapshots (snapshot table is too big)")
                damaged += Int64(rest)
                break
            }
            snapshots.append(entry)
            end = cursor.position
        }
        snapshotTableSize = UInt64(end - start)
        needsNewList = wasTooLong
        guard header.version >= 3 else { return damaged }
        for (index, entry) in snapshots.enumerated() where !entry.isComplete {
            let text = "snapshot table entry \(index) is incomplete"
            if mendsSnapshots { tellMending("Repairing \(text)") } else { say("ERROR \(text)") }
            damaged += 1
            needsNewList = true
        }
        return damaged
    }

    private func makesSense(_ entry: Qcow2Snapshot) -> Bool {
        let end = entry.l1Offset.addingReportingOverflow(UInt64(entry.l1Entries) * 8)
        return entry.hasID && (entry.l1Offset > 0 || entry.l1Entries == 0)
            && entry.l1Offset % UInt64(clusterSize) == 0 && !end.overflow
            && end.partialValue <= UInt64(fileSize)
    }

    private func refuseUnlessMending(_ text: String) throws(ImageError) {
        guard !mendsSnapshots else { return }
        say(text)
        throw ImageError.checkFailed(EFBIG)
    }

    /// Reports a part of a repair, unless this is only a look at the image.
    private func tellMending(_ text: String) { if repair != nil { say(text) } }

    /// Repairs the list of snapshots, if everything else is sound by now.
    ///
    /// - Parameter damaged: number of damaged entries.
    func mendSnapshots(_ damaged: Int64) async throws {
        guard result.corruptions == 0, result.checkErrors == 0 else {
            result.corruptions += damaged
            return
        }
        result.corruptionsFixed += damaged
        guard needsNewList else {
            // All entries are kept as they are, up to one of them.
            return try await image.changeHeader { [count = snapshots.count] in
                $0.snapshotCount = UInt32(count)
            }
        }
        let storage = try image.writable
        try await storage.flush()
        try await Qcow2SnapshotEditor.edit(storage, header, isRepair: true) {
            try await $0.rewriteList { _ in }
        }
        image = try await .damaged(storage)
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
                "\(title) l1_offset=0x\(entry.l1Offset.hexadecimal): L1 table is not cluster "
                    + "aligned; snapshot table entry corrupted")
        }
        guard entry.l1Entries <= Qcow2Header.maximumL1Entries else {
            return reportCorruption(
                "\(title) l1_size=0x\(entry.l1Entries.hexadecimal): L1 table is too large; "
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
