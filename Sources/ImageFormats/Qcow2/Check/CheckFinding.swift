/// A finding of a check, in qemu-img's words because programs parse them.
struct CheckFinding: Sendable {
    var text: String
    /// nil if nothing can be written that repairs the error.
    var repair: EntryRepair?
    /// Number of runs of the same collection that precede the finding.
    var position: Int
}

/// The repair of a table entry.
struct EntryRepair: Sendable {
    /// Place of the entry in bytes from the start of the file.
    var offset: Int64
    /// The words to write there.
    var words: [UInt64]
}

/// The host clusters that tables refer to, in the order of the tables, and the errors found there.
struct ClusterReferences: Sendable {
    var runs: [ClusterRun] = []
    var findings: [CheckFinding] = []
    var allocatedClusters: Int64 = 0
    var fragmentedClusters: Int64 = 0
    var compressedClusters: Int64 = 0
    /// Ranges of clusters behind the end of the file that tables name.
    var outside: [Range<UInt64>] = []
    /// Whether the entries have to be read again, because the marks in the counts do not tell
    /// everything about OFLAG_COPIED.
    var needsCopiedPass = false

    mutating func report(_ text: String, repair: EntryRepair? = nil) {
        findings.append(CheckFinding(text: text, repair: repair, position: runs.count))
        needsCopiedPass = true
    }
}

extension BinaryInteger {
    var hexadecimal: String { String(self, radix: 16) }
}
