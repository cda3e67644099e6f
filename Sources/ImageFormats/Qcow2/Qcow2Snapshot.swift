import DiskImage
import ImageStorage

/// An internal snapshot, as the snapshot table describes it.
///
/// Source: QEMU's docs/interop/qcow2.txt, section "Snapshots".
struct Qcow2Snapshot: Sendable, Equatable {
    let facts: ImageSnapshot
    /// Where the L1 table lies that maps the disk as it was then, as the entry says it.
    let l1Offset: UInt64
    let l1Entries: Int64

    var id: [UInt8] { facts.id }
    var name: [UInt8] { facts.name }

    /// What qemu allows.
    private static let maximumCount: Int64 = 65536
    /// What is read of a table, in bytes: 65536 snapshots with names of usual length.
    private static let maximumTableSize: Int64 = 8 << 20
    private static let maximumExtraData = 1024
    private static let fixedLength = 40

    static func readAll(
        _ storage: any Storage, at offset: UInt64, count: Int64
    ) async throws -> [Qcow2Snapshot] {
        guard count > 0 else { return [] }
        guard count <= maximumCount else {
            throw ImageError.corrupt(storage.name, "too many snapshots: \(count)")
        }
        var cursor = try MetadataCursor(
            storage, "snapshot table", at: offset, maximum: maximumTableSize)
        var snapshots: [Qcow2Snapshot] = []
        for _ in 0..<count {
            let fixed = try await cursor.next(fixedLength)
            let extraLength = Int(fixed.bigEndian(at: 36, as: UInt32.self))
            guard extraLength <= maximumExtraData else {
                throw ImageError.corrupt(
                    storage.name, "a snapshot has \(extraLength) bytes of extra data")
            }
            let length =
                extraLength + Int(fixed.bigEndian(at: 12, as: UInt16.self))
                + Int(fixed.bigEndian(at: 14, as: UInt16.self))
            let rest = try await cursor.next(length)
            snapshots.append(Qcow2Snapshot(fixed, rest, extraLength: extraLength))
            // Entries are filled up to multiples of 8, except the last one at the end of a file.
            let padding = (fixedLength + length).roundedUp(to: 8) - fixedLength - length
            if padding > 0, Int64(snapshots.count) < count { _ = try await cursor.next(padding) }
        }
        return snapshots
    }

    private init(_ fixed: [UInt8], _ rest: [UInt8], extraLength: Int) {
        let idEnd = extraLength + Int(fixed.bigEndian(at: 12, as: UInt16.self))
        let counted = extraLength >= 24 ? rest.bigEndian(at: 16, as: UInt64.self) : .max
        facts = ImageSnapshot(
            id: Array(rest[extraLength..<idEnd].prefix { $0 != 0 }),
            name: Array(rest[idEnd...].prefix { $0 != 0 }),
            seconds: fixed.bigEndian(at: 16, as: UInt32.self),
            nanoseconds: fixed.bigEndian(at: 20, as: UInt32.self),
            guestNanoseconds: fixed.bigEndian(at: 24, as: UInt64.self),
            // Larger states have their size in the extra data.
            stateSize: extraLength >= 8
                ? rest.bigEndian(at: 0, as: UInt64.self)
                : UInt64(fixed.bigEndian(at: 32, as: UInt32.self)),
            instructionCount: counted == .max ? nil : counted)
        l1Offset = fixed.bigEndian(at: 0, as: UInt64.self)
        l1Entries = Int64(fixed.bigEndian(at: 8, as: UInt32.self))
    }
}
