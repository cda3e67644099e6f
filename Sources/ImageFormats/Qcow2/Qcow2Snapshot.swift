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
    /// Whether the entry has room for an id, as those of all programs have.
    var hasID: Bool { entry.bigEndian(at: 12, as: UInt16.self) > 0 }
    var name: [UInt8] { facts.name }

    /// Size of the guest disk in bytes when the snapshot was taken; nil if it was not recorded.
    let diskSize: Int64?
    /// Length of the entry's extra data in bytes.
    let extraLength: Int
    /// The entry as it stands in the table, without the padding behind it.
    let entry: [UInt8]

    /// qemu's limits: the number of snapshots, and the extra data of each in bytes.
    static let maximumCount: UInt32 = 65536
    static let maximumExtraData = 1024
    /// Length in bytes of the extra data that version 3 asks for in each entry: the 64-bit size of
    /// the machine state and the size of the disk.
    private static let neededExtraData = 16
    /// Limit of the table in bytes: 65536 snapshots with names of usual length.
    private static let maximumTableSize: Int64 = 8 << 20
    private static let fixedLength = 40
    fileprivate static let extraLengthOffset = 36

    static func readAll(of header: Qcow2Header, in storage: any Storage) async throws -> [Self] {
        guard header.snapshotCount > 0 else { return [] }
        guard header.snapshotCount <= maximumCount else {
            throw ImageError.corrupt(storage.name, "Snapshot table too large")
        }
        var cursor = try MetadataCursor(
            storage, "snapshot table", at: header.snapshotTableOffset, maximum: maximumTableSize)
        var snapshots: [Qcow2Snapshot] = []
        for index in 0..<header.snapshotCount {
            snapshots.append(
                try await next(&cursor) { _ throws(ImageError) in
                    throw .corrupt(
                        storage.name,
                        "Too much extra metadata in snapshot table entry \(index)")
                })
        }
        return snapshots
    }

    /// Reads the next entry of a snapshot table; entries begin at multiples of 8.
    ///
    /// - Parameter onTooMuch: called with the length of extra data in bytes that is too long;
    ///   throws, or has it shortened to the limit.
    /// - Throws: what `onTooMuch` throws, and the errors of the cursor.
    static func next(
        _ cursor: inout MetadataCursor, onTooMuch: (_ length: Int) throws(ImageError) -> Void
    ) async throws -> Qcow2Snapshot {
        cursor.align(to: 8)
        var fixed = try await cursor.next(fixedLength)
        let length = Int(fixed.bigEndian(at: extraLengthOffset, as: UInt32.self))
        let kept = min(length, maximumExtraData)
        if length > kept {
            try onTooMuch(length)
            fixed.setExtraLength(kept)
        }
        let extra = try await cursor.next(kept)
        cursor.skip(Int64(length - kept))
        let names = try await cursor.next(
            Int(fixed.bigEndian(at: 12, as: UInt16.self))
                + Int(fixed.bigEndian(at: 14, as: UInt16.self)))
        return Qcow2Snapshot(fixed, extra + names, extraLength: kept)
    }

    /// Whether the entry has the facts that version 3 asks for.
    var isComplete: Bool { extraLength >= Self.neededExtraData }

    /// Returns the snapshot with the facts that version 3 asks for.
    ///
    /// - Parameter diskSize: size in bytes if the entry does not tell it: a disk with snapshots
    ///   keeps its size in version 2.
    func completed(diskSize: Int64) -> Qcow2Snapshot {
        guard !isComplete else { return self }
        let extra = Self.extraData(stateSize: facts.stateSize, diskSize: diskSize)
        var fixed = Array(entry[..<Self.fixedLength])
        fixed.setExtraLength(extra.count)
        return Qcow2Snapshot(
            fixed, extra + entry[(Self.fixedLength + extraLength)...], extraLength: extra.count)
    }

    /// The size of the state, that of the disk, and no count of instructions.
    private static func extraData(stateSize: UInt64, diskSize: Int64) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(stateSize)
        bytes.appendBigEndian(UInt64(diskSize))
        bytes.appendBigEndian(UInt64.max)
        return bytes
    }

    /// Makes a snapshot without machine state.
    ///
    /// - Parameters:
    ///   - l1: place and number of entries of the copy of the L1 table.
    ///   - diskSize: in bytes.
    ///   - time: since 1970, UTC.
    init(
        id: [UInt8], name: [UInt8], l1: (offset: HostOffset, entries: Int64), diskSize: Int64,
        time: (seconds: UInt32, nanoseconds: UInt32)
    ) {
        var fixed: [UInt8] = []
        fixed.appendBigEndian(UInt64(l1.offset.bytes))
        fixed.appendBigEndian(UInt32(l1.entries))
        fixed.appendBigEndian(UInt16(id.count))
        fixed.appendBigEndian(UInt16(name.count))
        fixed.appendBigEndian(time.seconds)
        fixed.appendBigEndian(time.nanoseconds)
        // The time that the guest has run, and the size of its state in 32 bits.
        fixed.appendBigEndian(UInt64(0))
        fixed.appendBigEndian(UInt32(0))
        let extra = Self.extraData(stateSize: 0, diskSize: diskSize)
        fixed.appendBigEndian(UInt32(extra.count))
        self.init(fixed, extra + id + name, extraLength: extra.count)
    }

    private init(_ fixed: [UInt8], _ rest: [UInt8], extraLength: Int) {
        entry = fixed + rest
        self.extraLength = extraLength
        diskSize =
            extraLength >= 16 ? Int64(clamping: rest.bigEndian(at: 8, as: UInt64.self)) : nil
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

extension [UInt8] {
    /// Changes the length of the extra data in the fixed part of an entry.
    fileprivate mutating func setExtraLength(_ count: Int) {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(UInt32(count))
        replaceSubrange(
            Qcow2Snapshot.extraLengthOffset..<Qcow2Snapshot.extraLengthOffset + 4, with: bytes)
    }
}
