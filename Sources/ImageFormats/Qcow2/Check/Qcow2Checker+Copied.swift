import DiskImage
import Glibc
import ImageStorage

// Checking OFLAG_COPIED, by which active tables say whether the refcount of a cluster is one.
extension Qcow2Checker {
    /// Reads all active tables again. That is needed only in a repair, or if the marks of the
    /// counts contradict the refcounts.
    func checkCopiedFlags() async throws {
        // Once the refcounts are right, they tell what the flags have to be.
        let isSafe = damage.checkErrors == 0 && damage.corruptions == 0 && damage.leaks == 0
        let repairs = repair == .all || (repair == .leaks && isSafe)
        if repair != nil { try await image.writable.flush() }
        var refcounts = RefcountCache(refcounts)
        var buffer = try IOBuffer(byteCount: Int(clusterSize))
        for index in l1.indices {
            let offset = l1[index] & Qcow2Entry.offsetMask
            guard offset != 0 else { continue }
            try Task.checkCancellation()
            let cluster = Int(offset >> UInt64(header.geometry.clusterBits))
            guard let refcount = try await refcounts.refcount(of: cluster) else { continue }
            if (refcount == 1) != (l1[index] & Qcow2Entry.copied != 0) {
                let verb = repairs ? "Repairing" : "ERROR"
                reportCorruption(
                    "\(verb) OFLAG_COPIED L2 cluster: l1_index=\(index) "
                        + "l1_entry=\(l1[index].hexadecimal) refcount=\(refcount)")
                if repairs {
                    image.l1[index] ^= Qcow2Entry.copied
                    try await image.writeL1(index..<index + 1)
                    damage.corruptions -= 1
                    damage.corruptionsFixed += 1
                }
            }
            guard try await storage.readAvailable(into: &buffer, at: Int64(offset)) > 0 else {
                continue
            }
            try await checkCopiedFlags(&buffer, at: Int64(offset), repairs, &refcounts)
        }
    }

    private func checkCopiedFlags(
        _ table: inout IOBuffer, at offset: Int64, _ repairs: Bool, _ refcounts: inout RefcountCache
    ) async throws {
        let entrySize = Int(header.geometry.wordsPerL2Entry) * 8
        var fixed: [(position: Int, entry: UInt64)] = []
        for position in stride(from: 0, to: table.byteCount, by: entrySize) {
            let entry = table.bytes.bigEndian(at: position, as: UInt64.self)
            guard hasCluster(entry) else { continue }
            let host = entry & Qcow2Entry.offsetMask
            let cluster = Int(host >> UInt64(header.geometry.clusterBits))
            // The clusters of a data file have no refcounts and count as used once.
            guard
                let refcount =
                    header.hasDataFile ? 1 : try await refcounts.refcount(of: cluster),
                (refcount == 1) != (entry & Qcow2Entry.copied != 0)
            else { continue }
            reportCorruption(
                "\(repairs ? "Repairing" : "ERROR") OFLAG_COPIED data cluster: "
                    + "l2_entry=\(entry.hexadecimal) refcount=\(refcount)")
            if repairs { fixed.append((position, entry ^ Qcow2Entry.copied)) }
        }
        guard let first = fixed.first, let last = fixed.last else { return }
        guard try await isWritableTable(offset) else {
            say(
                "ERROR: Could not write L2 table; metadata overlap check failed: "
                    + String(cString: strerror(EIO)))
            damage.checkErrors += 1
            return
        }
        // Only the entries from the first to the last changed one are written.
        var words = stride(from: first.position, through: last.position, by: 8).map {
            table.bytes.bigEndian(at: $0, as: UInt64.self)
        }
        for (position, entry) in fixed { words[(position - first.position) / 8] = entry }
        try await image.writable.writeWords(words, at: offset + Int64(first.position))
        damage.corruptions -= Int64(fixed.count)
        damage.corruptionsFixed += Int64(fixed.count)
    }

    /// Whether an entry names a standard cluster with a place in the file, even if it reads as
    /// zeros.
    private func hasCluster(_ entry: UInt64) -> Bool {
        guard entry & Qcow2Entry.compressed == 0 else { return false }
        if entry & Qcow2Entry.offsetMask != 0 { return true }
        let isZero = !header.geometry.hasExtendedL2 && entry & Qcow2Entry.zero != 0
        return header.hasDataFile && !isZero && entry & Qcow2Entry.copied != 0
    }
}
