import DiskImage

/// An internal snapshot, as the option `-l` names it. Ids and names are bytes, as in the image.
public enum SnapshotName: Sendable, Equatable {
    /// An id, or a name if no snapshot has this id.
    case either([UInt8])
    /// An id and a name that both have to match; nil matches every snapshot.
    case exact(id: [UInt8]?, name: [UInt8]?)

    /// Parses the value of `-l`.
    ///
    /// - Parameter text: `snapshot.id=ID,snapshot.name=NAME`, one of the two, or an id or name
    ///   alone.
    /// - Throws: `ImageError` for a list with any other key.
    public init(_ text: [UInt8]) throws(ImageError) {
        guard text.starts(withASCII: "snapshot.") else {
            self = .either(text)
            return
        }
        var id: [UInt8]?
        var name: [UInt8]?
        for word in OptionWords.split(text) {
            let sides = OptionWords.sides(of: word)
            switch sides?.key {
            case "snapshot.id": id = sides?.value
            case "snapshot.name": name = sides?.value
            default:
                let words = "Failed in parsing snapshot param '\(text.text)'"
                throw ImageError.invalid(words).asQemu(
                    "Invalid parameter '\(sides?.key ?? word.text)'",
                    hint: "qemu-img: \(words.withoutControlCharacters)")
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
    /// Returns the header of the image with the snapshot's L1 table in place of the disk's.
    ///
    /// - Parameter image: name of the image, for messages.
    func of(_ snapshot: Qcow2Snapshot, in image: String) throws(ImageError) -> Qcow2Header {
        guard snapshot.l1Entries <= Self.maximumL1Entries,
            let offset = Int64(exactly: snapshot.l1Offset), offset % geometry.clusterSize == 0
        else {
            throw .corrupt(image, "the L1 table of snapshot '\(snapshot.name.text)' is invalid")
        }
        var header = self
        header.l1Offset = HostOffset(offset)
        header.l1Entries = snapshot.l1Entries
        return header
    }
}
