import DiskImage

/// Which of an image's internal snapshots somebody means (`-l`).
public enum SnapshotName: Sendable, Equatable {
    /// An id, or the name of one if no snapshot has such an id.
    case either(String)
    /// Both have to be right; nil fits any.
    case exact(id: String?, name: String?)

    private static let prefix = "snapshot."

    /// - Parameter text: `snapshot.id=ID,snapshot.name=NAME`, one of the two, or an id or name alone.
    /// - Throws: `ImageError` for a list with anything else in it.
    public init(_ text: String) throws(ImageError) {
        guard text.hasPrefix(Self.prefix) else {
            self = .either(text)
            return
        }
        var id: String?
        var name: String?
        for word in OptionWords.split(text) {
            let parts = word.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            switch (parts[0], parts.count) {
            case ("snapshot.id", 2): id = String(parts[1])
            case ("snapshot.name", 2): name = String(parts[1])
            default: throw .invalid("Failed in parsing snapshot param '\(text)'")
            }
        }
        self = .exact(id: id, name: name)
    }

    func find(in snapshots: [Qcow2Snapshot]) -> Qcow2Snapshot? {
        switch self {
        case .either(let text):
            snapshots.first { $0.id == text } ?? snapshots.first { $0.name == text }
        case .exact(let id, let name):
            snapshots.first { (id ?? $0.id) == $0.id && (name ?? $0.name) == $0.name }
        }
    }
}

extension Qcow2Header {
    /// The header as it would be if the snapshot were the disk.
    ///
    /// - Parameter image: its name, for messages.
    func of(_ snapshot: Qcow2Snapshot, in image: String) throws(ImageError) -> Qcow2Header {
        guard snapshot.l1Entries <= Self.maximumL1Entries,
            let offset = Int64(exactly: snapshot.l1Offset), offset % geometry.clusterSize == 0
        else {
            throw .corrupt(image, "the L1 table of snapshot '\(snapshot.name)' is invalid")
        }
        var header = self
        header.l1Offset = HostOffset(offset)
        header.l1Entries = snapshot.l1Entries
        return header
    }
}
