import DiskImage
import ImageStorage

/// An internal snapshot, as the snapshot table describes it.
///
/// Source: QEMU's docs/interop/qcow2.txt, section "Snapshots".
struct Qcow2Snapshot: Sendable, Equatable {
    let facts: ImageSnapshot
    /// Offset in bytes of the L1 table that maps the disk of the snapshot, as stored in the entry.
    let l1Offset: UInt64
    let l1Entries: Int64

    var id: [UInt8] { facts.id }
    var name: [UInt8] { facts.name }

    /// Length of the entry's extra data in bytes.
    let extraLength: Int

    /// qemu's limits: the number of snapshots, and the extra data of each in bytes.
    static let maximumCount: UInt32 = 65536
    private static let maximumExtraData = 1024
    /// Limit of the table in bytes: 65536 snapshots with names of usual length.
    private static let maximumTableSize: Int64 = 8 << 20
    private static let fixedLength = 40

    struct TooMuchExtraData: Error {}

    static func readAll(of header: Qcow2Header, in storage: any Storage) async throws -> [Self] {
        guard header.snapshotCount > 0 else { return [] }
        guard header.snapshotCount <= maximumCount else {
            throw ImageError.corrupt(storage.name, "too many snapshots: \(header.snapshotCount)")
        }
        var cursor = try MetadataCursor(
            storage, "snapshot table", at: header.snapshotTableOffset, maximum: maximumTableSize)
        var snapshots: [Qcow2Snapshot] = []
        for _ in 0..<header.snapshotCount {
            do {
                snapshots.append(try await next(&cursor))
            } catch is TooMuchExtraData {
                throw ImageError.corrupt(storage.name, "a snapshot has too much extra data")
            }
        }
        return snapshots
    }

    /// Reads the next entry of a snapshot table; entries begin at multiples of 8.
    ///
    /// - Throws: `TooMuchExtraData`, and the errors of the cursor.
    static func next(_ cursor: inout MetadataCursor) async throws -> Qcow2Snapshot {
        cursor.align(to: 8)
        let fixed = try await cursor.next(fixedLength)
        let extraLength = Int(fixed.bigEndian(at: 36, as: UInt32.self))
        guard extraLength <= maximumExtraData else { throw TooMuchExtraData() }
        let rest = try await cursor.next(
            extraLength + Int(fixed.bigEndian(at: 12, as: UInt16.self))
                + Int(fixed.bigEndian(at: 14, as: UInt16.self)))
        return Qcow2Snapshot(fixed, rest, extraLength: extraLength)
    }

    private init(_ fixed: [UInt8], _ rest: [UInt8], extraLength: Int) {
        self.extraLength = extraLength
        let idEnd = extraLength + Int(fixed.bigEndian(at: 12, as: UInt16.self))
        let counted = extraLength >= 24 ? rest.bigEndian(at: 16, as: UInt64.self) : .max
        facts = ImageSnapshot(
            id: Array(rest[extraLength..<idEnd].prefix { $0 != 0 }),
            name: Array(rest[idEnd...].prefix { $0 != 0 }),
            seconds: fixed.bigEndian(at: 16, as: UInt32.self),
            nanoseconds: fixed.bigEndian(at: 20, as: UInt32.self),
            guestNanoseconds: fixed.bigEndian(at: 24, as: UInt64.self),
            // The extra data has 64 bits for the size, the fixed part only 32.
            stateSize: extraLength >= 8
                ? rest.bigEndian(at: 0, as: UInt64.self)
                : UInt64(fixed.bigEndian(at: 32, as: UInt32.self)),
            instructionCount: counted == .max ? nil : counted)
        l1Offset = fixed.bigEndian(at: 0, as: UInt64.self)
        l1Entries = Int64(fixed.bigEndian(at: 8, as: UInt32.self))
    }
}
