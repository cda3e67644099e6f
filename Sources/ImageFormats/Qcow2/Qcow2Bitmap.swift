import DiskImage
import ImageStorage

/// A persistent bitmap, as the bitmap directory describes it.
///
/// Source: QEMU's docs/interop/qcow2.txt, section "Bitmaps".
struct Qcow2Bitmap: Sendable, Equatable {
    /// The name as bytes, mostly but not necessarily UTF-8.
    let nameBytes: [UInt8]
    /// Length in bytes of the piece of disk that one bit stands for.
    let granularity: Int64
    /// Whether the bitmap was not saved properly and is void.
    var isInUse = false
    /// Whether every program that writes to the image has to record its writes in the bitmap.
    var isAuto: Bool
    /// Offset in bytes of the table that names the clusters of the bitmap.
    var tableOffset: UInt64 = 0
    var tableEntries: UInt32 = 0

    var name: String { nameBytes.text }

    private static let fixedLength = 24
    static let maximumNameLength = 1023
    static let granularityBits = 9...31
    /// Largest size of the bits of a bitmap in bytes (qemu's limit).
    private static let maximumSize: Int64 = 512 << 20

    static func readAll(
        _ storage: any Storage, _ directory: Qcow2BitmapDirectory, _ geometry: Qcow2Geometry
    ) async throws -> [Qcow2Bitmap] {
        try directory.check(storage.name, geometry.clusterSize)
        var cursor = try MetadataCursor(
            storage, "bitmap directory", at: directory.offset, maximum: Int64(directory.size))
        var bitmaps: [Qcow2Bitmap] = []
        var left = Int(directory.size)
        while left > 0 {
            try MemoryMargin.check()
            let fixed = try await cursor.next(fixedLength)
            let nameLength = Int(fixed.bigEndian(at: 18, as: UInt16.self))
            guard fixed.bigEndian(at: 20, as: UInt32.self) == 0 else {
                throw ImageError.unsupported(
                    storage.name, "bitmaps with extra data are not supported")
            }
            let padded = entryLength(nameLength)
            let rest = try await cursor.next(padded - fixedLength)
            bitmaps.append(
                try Qcow2Bitmap(fixed, Array(rest[..<nameLength]), storage.name, geometry))
            left -= padded
        }
        guard bitmaps.count == directory.count else {
            throw ImageError.corrupt(
                storage.name,
                "the bitmap directory has \(bitmaps.count) bitmaps, the header names "
                    + "\(directory.count)")
        }
        return bitmaps
    }

    /// Length of the bitmap's entry in the directory, in bytes: entries begin at multiples of 8.
    var entryLength: Int { Self.entryLength(nameBytes.count) }

    private static func entryLength(_ nameLength: Int) -> Int {
        (fixedLength + nameLength).roundedUp(to: 8)
    }

    private init(
        _ fixed: [UInt8], _ name: [UInt8], _ file: String, _ geometry: Qcow2Geometry
    ) throws(ImageError) {
        tableOffset = fixed.bigEndian(at: 0, as: UInt64.self)
        tableEntries = fixed.bigEndian(at: 8, as: UInt32.self)
        let bitmapBytes = Int64(tableEntries) * geometry.clusterSize
        let flags = fixed.bigEndian(at: 12, as: UInt32.self)
        let granularityBits = fixed[17]
        guard tableOffset > 0, tableOffset % UInt64(geometry.clusterSize) == 0,
            (1...Self.maximumSize).contains(bitmapBytes),
            flags & ~3 == 0, fixed[16] == 1, Self.granularityBits.contains(Int(granularityBits)),
            (1...Self.maximumNameLength).contains(name.count),
            // A bitmap in use may be a leftover from when the disk had another size.
            flags & 1 != 0
                || geometry.virtualSize.dividedUp(by: 1 << Int64(granularityBits)) <= bitmapBytes
                    * 8
        else { throw .corrupt(file, "bitmap '\(name.text)' has an invalid directory entry") }
        nameBytes = name
        granularity = 1 << Int64(granularityBits)
        isInUse = flags & 1 != 0
        isAuto = flags & 2 != 0
    }

    /// Makes a bitmap that has no table yet.
    init(name: [UInt8], granularity: Int64, isAuto: Bool) {
        nameBytes = name
        self.granularity = granularity
        self.isAuto = isAuto
    }

    /// The error for a bitmap that was not saved properly, in qemu-img's words.
    var inconsistent: ImageError {
        .invalid(
            "Bitmap '\(name)' is inconsistent and cannot be used (bitmap --remove deletes it)")
    }

    /// Offset in bytes of the flags in the entry.
    static let flagsOffset: Int64 = 12

    var flags: UInt32 { (isInUse ? 1 : 0) | (isAuto ? 2 : 0) }

    /// The entry of the directory, padded.
    var serialized: [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(tableOffset)
        bytes.appendBigEndian(tableEntries)
        bytes.appendBigEndian(flags)
        // The type of bitmaps that track writes.
        bytes.append(1)
        bytes.append(UInt8(granularity.trailingZeroBitCount))
        bytes.appendBigEndian(UInt16(nameBytes.count))
        bytes.appendBigEndian(UInt32(0))
        bytes += nameBytes
        bytes.appendZeros(upTo: entryLength)
        return bytes
    }
}

/// The header extension that describes the bitmap directory.
struct Qcow2BitmapDirectory: Sendable, Equatable {
    let content: [UInt8]

    private static let length = 24
    static let maximumCount = 65535
    /// Largest size of the directory in bytes: 1024 for each bitmap, as in qemu.
    private static let maximumSize = UInt64(1024 * maximumCount)

    /// - Parameter content: bytes of any number; `check` validates them.
    init(_ content: RawSpan) { self.content = content.withUnsafeBytes { Array($0) } }

    /// - Parameters:
    ///   - offset: in bytes.
    ///   - size: in bytes.
    init(count: Int, offset: UInt64, size: UInt64) {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(UInt32(count))
        bytes.appendBigEndian(UInt32(0))
        bytes.appendBigEndian(size)
        bytes.appendBigEndian(offset)
        content = bytes
    }

    private var isWhole: Bool { content.count == Self.length }
    var count: Int { isWhole ? Int(content.bigEndian(at: 0, as: UInt32.self)) : 0 }
    private var reserved: UInt32 { isWhole ? content.bigEndian(at: 4, as: UInt32.self) : 0 }
    /// Size of the directory in bytes.
    var size: UInt64 { isWhole ? content.bigEndian(at: 8, as: UInt64.self) : 0 }
    var offset: UInt64 { isWhole ? content.bigEndian(at: 16, as: UInt64.self) : 0 }

    func check(_ file: String, _ clusterSize: Int64) throws(ImageError) {
        guard isWhole, reserved == 0, (1...Self.maximumCount).contains(count),
            offset % UInt64(clusterSize) == 0, size <= Self.maximumSize
        else { throw .corrupt(file, "the bitmaps extension of the header is invalid") }
    }
}
