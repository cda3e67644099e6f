import ImageStorage

/// The last answer about block status while it is valid, because a pipeline asks for neighbours.
struct NBDKnownStatus: Sendable {
    private(set) var known = ExtentList()
    /// Number of changes to the export.
    private(set) var changes = 0

    /// - Parameter changes: number before the server was asked. A later change makes the answer
    ///   invalid.
    mutating func note(_ answer: ExtentList, asOf changes: Int) {
        guard changes == self.changes else { return }
        known = answer
    }

    mutating func noteChange() {
        changes += 1
        known = ExtentList()
    }
}
