/// A finding of a check, in qemu-img's words because programs parse them.
struct CheckFinding: Sendable, Equatable {
    enum Severity: Sendable, Equatable {
        case corruption
        /// The repair writes these words into the table at this offset of the file, in bytes.
        case repairable(at: Int64, [UInt64])
    }

    var text: String
    var severity = Severity.corruption
    /// Number of runs of the same collection that precede the finding.
    var position: Int
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

    mutating func report(
        _ text: String, _ severity: CheckFinding.Severity = .corruption
    ) {
        findings.append(
            CheckFinding(text: text, severity: severity, position: runs.count))
        needsCopiedPass = true
    }
}

func hexadecimal(_ number: some BinaryInteger) -> String { String(number, radix: 16) }
