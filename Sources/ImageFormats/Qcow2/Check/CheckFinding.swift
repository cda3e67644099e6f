/// Something that a check tells of, in qemu-img's words: programs read them.
struct CheckFinding: Sendable, Equatable {
    enum Severity: Sendable, Equatable {
        case corruption
        /// To be put right by writing these words into the table at this offset of the file.
        case repairable(at: Int64, [UInt64])
    }

    var text: String
    var severity = Severity.corruption
    /// How many runs of the same collection stand before it.
    var position: Int
}

/// The host clusters that tables refer to, in the order of the tables, and what is wrong with
/// those.
struct ClusterReferences: Sendable {
    var runs: [ClusterRun] = []
    var findings: [CheckFinding] = []
    var allocatedClusters: Int64 = 0
    var fragmentedClusters: Int64 = 0
    var compressedClusters: Int64 = 0
    /// Ranges of clusters that tables name and that lie behind the end of the file.
    var outside: [Range<UInt64>] = []
    /// The marks in the counts do not tell all about OFLAG_COPIED: the entries have to be read
    /// again.
    var needsCopiedPass = false

    mutating func report(
        _ text: String, _ severity: CheckFinding.Severity = .corruption
    ) {
        findings.append(
            CheckFinding(text: text, severity: severity, position: runs.count))
        needsCopiedPass = true
    }
}

func hexadecimal(_ number: some BinaryInteger) -> String { String(number, radix: 16) }
