import DiskImage

/// The first 64 bytes of a Parallels image.
///
/// Source: QEMU's docs/interop/parallels.txt.
struct ParallelsHeader: Equatable {
    static let length = 64

    /// The unit that the entries of the block allocation table count.
    enum Kind {
        case sectors
        case clusters

        /// nil for anything that does not begin as an image does.
        init?(_ start: RawSpan) {
            guard start.byteCount >= 16 else { return nil }
            let magic = (0..<16).map { start.unsafeLoad(fromByteOffset: $0, as: UInt8.self) }
            switch magic.text {
            case "WithoutFreeSpace": self = .sectors
            case "WithouFreSpacExt": self = .clusters
            default: return nil
            }
        }
    }

    let kind: Kind
    /// In bytes.
    let clusterSize: Int64
    let tableEntries: Int64
    /// In bytes.
    let virtualSize: Int64
    /// Nothing that the table names counts.
    let isEmpty: Bool

    /// The largest cluster that qemu accepts, in sectors.
    private static let largestCluster: Int64 = Int64(Int32.max) / 513
    private static let mostEntries = Int64(Int32.max) / 4

    /// - Parameter name: of the image, for messages.
    init(_ bytes: RawSpan, name: String) throws(ImageError) {
        guard bytes.byteCount >= Self.length, let kind = Kind(bytes) else {
            throw .corrupt(name, "is not a Parallels image")
        }
        func number(at offset: Int) -> Int64 {
            let stored = bytes.unsafeLoadUnaligned(fromByteOffset: offset, as: UInt32.self)
            return Int64(UInt32(littleEndian: stored))
        }
        guard number(at: 16) == 2 else {
            throw .unsupported(
                name, "version \(number(at: 16)) of Parallels images is not supported")
        }
        let clusterSectors = number(at: 28)
        guard (1...Self.largestCluster).contains(clusterSectors) else {
            throw .corrupt(name, "a cluster has \(clusterSectors) sectors")
        }
        tableEntries = number(at: 32)
        guard tableEntries <= Self.mostEntries else {
            throw .corrupt(name, "the block allocation table has \(tableEntries) entries")
        }
        // Older images have no more than 32 bits for it.
        let sectors = number(at: 36) | (kind == .clusters ? number(at: 40) << 32 : 0)
        guard (0...largestDiskSize / guestSectorSize).contains(sectors) else {
            throw .corrupt(name, "the disk has \(UInt64(bitPattern: sectors)) sectors")
        }
        self.kind = kind
        clusterSize = clusterSectors * guestSectorSize
        virtualSize = sectors * guestSectorSize
        isEmpty = number(at: 52) & 1 != 0
    }

    /// The unit of table entries in bytes.
    var entryUnit: Int64 { kind == .clusters ? clusterSize : guestSectorSize }
    /// Where header and table end, in bytes: no data lies before.
    var dataStart: Int64 { Int64(Self.length) + tableEntries * 4 }
}
