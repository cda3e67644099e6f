import DiskImage
import Glibc
import ImageStorage

/// An entry of the bitmap directory, as far as a check needs it.
///
/// Source: QEMU's docs/interop/qcow2.txt, section "Bitmaps".
struct BitmapDirectoryEntry: Sendable, Equatable {
    static let headerLength = 24
    private static let maximumNameLength = 1023
    private static let knownFlags: UInt32 = 3
    private static let inUse: UInt32 = 1
    private static let granularityBits: ClosedRange<UInt8> = 9...31
    /// What qemu takes for a bitmap, in bytes.
    private static let maximumSize: Int64 = 512 << 20

    var tableOffset: UInt64
    var tableEntries: UInt32
    /// In bytes, with the padding.
    var length: Int

    /// nil for an entry that is no valid one.
    init?(_ bytes: RawSpan, at start: Int, _ geometry: Qcow2Geometry) {
        guard start + Self.headerLength <= bytes.byteCount else { return nil }
        tableOffset = bytes.bigEndian(at: start, as: UInt64.self)
        tableEntries = bytes.bigEndian(at: start + 8, as: UInt32.self)
        let flags = bytes.bigEndian(at: start + 12, as: UInt32.self)
        let type = bytes.unsafeLoad(fromByteOffset: start + 16, as: UInt8.self)
        let granularity = bytes.unsafeLoad(fromByteOffset: start + 17, as: UInt8.self)
        let nameLength = Int(bytes.bigEndian(at: start + 18, as: UInt16.self))
        let extraLength = bytes.bigEndian(at: start + 20, as: UInt32.self)
        length = (Self.headerLength + nameLength).roundedUp(to: 8)
        let size = Int64(tableEntries) * geometry.clusterSize
        guard tableEntries > 0, tableOffset > 0, size <= Self.maximumSize,
            tableOffset % UInt64(geometry.clusterSize) == 0, flags & ~Self.knownFlags == 0,
            type == 1, Self.granularityBits.contains(granularity), extraLength == 0,
            (1...Self.maximumNameLength).contains(nameLength),
            start + length <= bytes.byteCount
        else { return nil }
        // A byte counts eight pieces of the disk.
        let covered = (size * 8).multipliedReportingOverflow(by: 1 << Int64(granularity))
        guard
            flags & Self.inUse != 0 || covered.overflow
                || covered.partialValue >= geometry.virtualSize
        else { return nil }
    }
}

extension Qcow2Checker {
    private enum TableEntry {
        static let allOnes: UInt64 = 1
        static let reserved: UInt64 = 0xff00_0000_0000_01fe
    }

    /// - Throws: where the directory cannot be understood: what it refers to would look leaked.
    func countBitmaps() async throws {
        guard let bitmaps = header.bitmaps else { return }
        let range = bitmaps.directory
        try await count { $0.addRegion(offset: range.offset, size: range.length) }
        guard let start = Int64(exactly: range.offset), start < storage.size,
            range.length <= UInt64(storage.size - start)
        else { throw ImageError.checkFailed(EINVAL) }
        var directory = try IOBuffer(byteCount: Int(range.length))
        _ = try await storage.readAvailable(into: &directory, at: start)
        var entries: [BitmapDirectoryEntry] = []
        var position = 0
        while position < directory.byteCount {
            guard
                let entry = BitmapDirectoryEntry(
                    directory.bytes, at: position, header.geometry)
            else { throw ImageError.checkFailed(EINVAL) }
            entries.append(entry)
            position += entry.length
        }
        guard entries.count == bitmaps.count else { throw ImageError.checkFailed(EINVAL) }
        for entry in entries { try await count(entry) }
    }

    private func count(_ entry: BitmapDirectoryEntry) async throws {
        try await count {
            $0.addRegion(offset: entry.tableOffset, size: UInt64(entry.tableEntries) * 8)
        }
        guard let offset = Int64(exactly: entry.tableOffset), offset < storage.size else { return }
        let table = try await storage.readWords(at: offset, count: Int64(entry.tableEntries))
        var invalid: Int64 = 0
        try await count { collector in
            for entry in table {
                let offset = entry & Qcow2Entry.offsetMask
                guard entry & TableEntry.reserved == 0,
                    offset == 0
                        || entry & TableEntry.allOnes == 0 && offset % UInt64(clusterSize) == 0
                else {
                    invalid += 1
                    continue
                }
                if offset != 0 {
                    collector.addRegion(offset: offset, size: UInt64(clusterSize))
                }
            }
        }
        damage.corruptions += invalid
    }
}
