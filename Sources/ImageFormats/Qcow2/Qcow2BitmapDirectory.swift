import DiskImage
import ImageStorage

/// The list of an image's persistent bitmaps.
///
/// Source: QEMU's docs/interop/qcow2.txt, sections "Bitmaps extension" and "Bitmap directory".
struct Qcow2BitmapDirectory: Sendable, Equatable {
    /// The autoclear bit that says: whoever wrote last to the image took care of its bitmaps.
    static let autoclearFeature: UInt64 = 1
    static let extensionLength = 24
    private static let fixedEntryLength = 24
    /// What qemu accepts: 65535 bitmaps of 1024 bytes each.
    private static let maximumSize: Int64 = 65535 * 1024
    private static let inUse: UInt32 = 1

    let count: Int
    let offset: HostOffset
    /// In bytes.
    let size: Int64

    /// - Returns: nil if the extension is none that makes sense; it is no part of the guest disk.
    init?(extension bytes: RawSpan) {
        guard bytes.byteCount >= Self.extensionLength,
            let size = Int64(exactly: bytes.bigEndian(at: 8, as: UInt64.self)),
            let offset = Int64(exactly: bytes.bigEndian(at: 16, as: UInt64.self)),
            size <= Self.maximumSize
        else { return nil }
        count = Int(bytes.bigEndian(at: 0, as: UInt32.self))
        self.offset = HostOffset(offset)
        self.size = size
    }

    struct Entry: Sendable, Equatable {
        /// Of the name, in bytes.
        var nameLength: Int
        /// How much of the disk one bit stands for, in bytes.
        var granularity: Int64
        /// It was being written when its writer went away.
        var isInUse: Bool
    }

    /// Reads all entries.
    ///
    /// - Throws: `ImageError` if they do not lie where the header says.
    func entries(in storage: any Storage) async throws -> [Entry] {
        let (end, overflow) = offset.bytes.addingReportingOverflow(size)
        guard !overflow, end <= storage.size else {
            throw ImageError.corrupt(
                storage.name, "the bitmap directory lies beyond the end of the file")
        }
        var buffer = IOBuffer(byteCount: Int(size))
        var span = buffer.mutableBytes
        try await storage.read(into: &span, at: offset.bytes)
        return try entries(in: buffer.bytes, storage.name)
    }

    private func entries(in bytes: RawSpan, _ name: String) throws(ImageError) -> [Entry] {
        var result: [Entry] = []
        var position = 0
        while result.count < count {
            guard position + Self.fixedEntryLength <= bytes.byteCount else {
                throw .corrupt(name, "the bitmap directory is cut short")
            }
            let granularityBits = bytes.unsafeLoad(fromByteOffset: position + 17, as: UInt8.self)
            guard granularityBits < 32 else {
                throw .corrupt(name, "a bitmap has a granularity of 2^\(granularityBits) bytes")
            }
            let nameLength = Int(bytes.bigEndian(at: position + 18, as: UInt16.self))
            let extraLength = Int(bytes.bigEndian(at: position + 20, as: UInt32.self))
            result.append(
                Entry(
                    nameLength: nameLength, granularity: 1 << Int64(granularityBits),
                    isInUse: bytes.bigEndian(at: position + 12, as: UInt32.self) & Self.inUse != 0))
            position += Self.entryLength(name: nameLength, extra: extraLength)
        }
        return result
    }

    /// How long an entry is, in bytes: entries begin at multiples of 8.
    static func entryLength(name: Int, extra: Int = 0) -> Int {
        (fixedEntryLength + extra + name).roundedUp(to: 8)
    }
}

extension Qcow2Source {
    /// How many bytes copies of the image's bitmaps would take in an image with clusters of this size, all of
    /// each allocated; nil for images that cannot have any (version 2). A bitmap that was not closed is no use
    /// to anybody and does not count.
    ///
    /// - Throws: `ImageError` if the bitmap directory cannot be read.
    public func bitmapsSize(clusterSize: Int64) async throws -> Int64? {
        guard header.version >= 3 else { return nil }
        guard let directory = header.extras.bitmapDirectory else { return 0 }
        var sum: Int64 = 0
        var directorySize: Int64 = 0
        for entry in try await directory.entries(in: storage) where !entry.isInUse {
            let bytes = virtualSize.dividedUp(by: entry.granularity).dividedUp(by: 8)
            let clusters = bytes.dividedUp(by: clusterSize)
            sum += clusters * clusterSize + (clusters * 8).roundedUp(to: clusterSize)
            directorySize += Int64(Qcow2BitmapDirectory.entryLength(name: entry.nameLength))
        }
        return sum + directorySize.roundedUp(to: clusterSize)
    }
}
