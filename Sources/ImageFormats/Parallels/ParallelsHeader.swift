import DiskImage

/// The first 64 bytes of a Parallels image.
///
/// Source: QEMU's docs/interop/parallels.txt.
struct ParallelsHeader: Equatable {
    static let length = 64

    /// The unit of the entries in the block allocation table.
    enum Kind {
        case sectors
        case clusters

        /// Returns nil if the bytes are not the start of a Parallels image.
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
    /// Size of a cluster in bytes.
    let clusterSize: Int64
    let tableEntries: Int64
    /// Size of the guest disk in bytes.
    let virtualSize: Int64
    /// Whether the image is marked as empty: it reads as zeros, and its table names no clusters.
    let isEmpty: Bool

    /// Largest cluster that qemu accepts, in sectors.
    private static let largestCluster: Int64 = Int64(Int32.max) / 513
    private static let mostEntries = Int64(Int32.max) / 4

    /// - Parameter name: name of the image, for messages.
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
        // The older kind of image has only 32 bits for the size.
        let sectors = number(at: 36) | (kind == .clusters ? number(at: 40) << 32 : 0)
        guard (0...largestDiskSize / guestSectorSize).contains(sectors) else {
            throw .corrupt(name, "the disk has \(UInt64(bitPattern: sectors)) sectors")
        }
        self.kind = kind
        clusterSize = clusterSectors * guestSectorSize
        virtualSize = sectors * guestSectorSize
        isEmpty = number(at: 52) & 1 != 0
    }

    /// Unit of the table entries in bytes.
    var entryUnit: Int64 { kind == .clusters ? clusterSize : guestSectorSize }
    /// End of header and table in bytes; all data lies behind it.
    var dataStart: Int64 { Int64(Self.length) + tableEntries * 4 }
}
