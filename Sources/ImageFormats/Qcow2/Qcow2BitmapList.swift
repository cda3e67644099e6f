import DiskImage
import ImageStorage

/// The persistent bitmaps of an image that is changed in place.
///
/// Changed bits, their tables and the directory are written to new places, to which one write of
/// the header leads.
///
/// Source: QEMU's docs/interop/qcow2.txt, section "Bitmaps".
struct Qcow2BitmapList: Sendable {
    /// A table entry without a cluster says that all bits have one value.
    private static let allOnes: UInt64 = 1

    private(set) var bitmaps: [Qcow2Bitmap]
    /// The bits of bitmaps that have been read, by name.
    private var bits: [[UInt8]: BitmapBits] = [:]
    /// The bitmaps as the file has them.
    private let stored: [Qcow2Bitmap]
    private let directory: Qcow2BitmapDirectory?

    /// Reads the directory.
    ///
    /// - Throws: `ImageError` if it is damaged.
    init(reading image: Qcow2WritableImage) async throws {
        directory = image.header.bitmapDirectory
        stored =
            if let directory {
                try await Qcow2Bitmap.readAll(image.storage, directory, image.geometry)
            } else { [] }
        bitmaps = stored
    }

    func index(of name: [UInt8]) -> Int? { bitmaps.firstIndex { $0.nameBytes == name } }

    // MARK: Changes

    mutating func append(_ bitmap: Qcow2Bitmap, _ geometry: Qcow2Geometry) throws(ImageError) {
        bits[bitmap.nameBytes] = try BitmapBits(geometry.virtualSize, bitmap.granularity)
        bitmaps.append(bitmap)
    }

    mutating func remove(at index: Int) { bits[bitmaps.remove(at: index).nameBytes] = nil }

    mutating func setAuto(_ isAuto: Bool, at index: Int) { bitmaps[index].isAuto = isAuto }

    mutating func clear(at index: Int, _ geometry: Qcow2Geometry) throws(ImageError) {
        let bitmap = bitmaps[index]
        bits[bitmap.nameBytes] = try BitmapBits(geometry.virtualSize, bitmap.granularity)
    }

    mutating func merge(_ other: BitmapBits, at index: Int) {
        bits[bitmaps[index].nameBytes]?.merge(other)
    }

    /// Follows a disk that gets another size. New bits are not set.
    ///
    /// - Parameter virtualSize: in bytes.
    mutating func resize(to virtualSize: Int64) throws(ImageError) {
        for index in bits.values.indices { try bits.values[index].resize(to: virtualSize) }
    }

    /// Notes that a range of the guest disk is written, in bytes.
    mutating func note(_ range: Range<Int64>) {
        for index in bits.values.indices { bits.values[index].insert(range) }
    }

    // MARK: Bits

    /// Reads the bits of a bitmap, to be changed and stored.
    mutating func load(at index: Int, of image: Qcow2WritableImage) async throws {
        let bitmap = bitmaps[index]
        guard bits[bitmap.nameBytes] == nil else { return }
        bits[bitmap.nameBytes] = try await Self.bits(of: bitmap, image)
    }

    /// The bits of a bitmap; nil if they have not been read.
    func bits(at index: Int) -> BitmapBits? { bits[bitmaps[index].nameBytes] }

    private static func table(
        of bitmap: Qcow2Bitmap, _ image: Qcow2WritableImage
    ) async throws -> [UInt64] {
        try await image.storage.readWords(
            at: HostOffset(Int64(clamping: bitmap.tableOffset)),
            bytes: Int64(bitmap.tableEntries) * 8, "bitmap table")
    }

    private static func bits(
        of bitmap: Qcow2Bitmap, _ image: Qcow2WritableImage
    ) async throws -> BitmapBits {
        var bits = try BitmapBits(image.geometry.virtualSize, bitmap.granularity)
        let clusterSize = Int(image.geometry.clusterSize)
        for (number, entry) in try await table(of: bitmap, image).enumerated() {
            let start = number * clusterSize
            guard start < bits.bytes.count else { break }
            let part = start..<min(bits.bytes.count, start + clusterSize)
            let offset = Int64(entry & Qcow2Entry.offsetMask)
            if offset != 0 {
                let bytes = try await image.storage.readBytes(
                    at: HostOffset(offset), count: Int64(part.count), "bitmap")
                bits.replace(part, with: bytes)
            } else if entry & allOnes != 0 {
                bits.replace(part, with: [UInt8](repeating: 0xff, count: part.count))
            }
        }
        return bits
    }

    // MARK: Storing

    /// Reads the bits of bitmaps that are about to change, and marks these bitmaps as void in the
    /// file until `store`.
    ///
    /// - Parameter isMeant: tells the bitmaps.
    mutating func begin(
        _ image: Qcow2WritableImage, where isMeant: (Qcow2Bitmap) -> Bool
    ) async throws {
        var marked = bitmaps
        for index in bitmaps.indices where !bitmaps[index].isInUse && isMeant(bitmaps[index]) {
            try await load(at: index, of: image)
            marked[index].isInUse = true
        }
        if marked != bitmaps { try await write(marked, image) }
    }

    /// Takes the marks back, as long as nothing else has changed.
    func undo(_ image: Qcow2WritableImage) async throws {
        if !bits.isEmpty { try await write(stored, image) }
    }

    /// Writes the flags of bitmaps where they stand.
    private func write(_ bitmaps: [Qcow2Bitmap], _ image: Qcow2WritableImage) async throws {
        guard let directory else { return }
        var position = Int64(directory.offset)
        for bitmap in bitmaps {
            var bytes: [UInt8] = []
            bytes.appendBigEndian(bitmap.flags)
            try await image.writable.writeBytes(bytes, at: position + Qcow2Bitmap.flagsOffset)
            position += Int64(bitmap.entryLength)
        }
        try await image.writable.flush()
    }

    /// Writes the bits that were read or changed, and the directory, and makes the header lead to
    /// them.
    mutating func store(
        in image: inout Qcow2WritableImage, _ refcounts: inout Qcow2Refcounts
    ) async throws {
        guard bitmaps != stored || !bits.isEmpty else { return }
        let dropped = try await replacedClusters(image)
        for index in bitmaps.indices {
            guard let bits = bits[bitmaps[index].nameBytes] else { continue }
            try await store(bits, at: index, image, &refcounts)
        }
        let new = try await placeDirectory(image, &refcounts)
        try await refcounts.publish(in: &image)
        try await image.rewriteHeader {
            $0.bitmapExtension = new
            if new == nil {
                $0.autoclearFeatures &= ~Qcow2Header.AutoclearFeature.bitmaps
            } else {
                $0.autoclearFeatures |= Qcow2Header.AutoclearFeature.bitmaps
            }
        }
        try await refcounts.release(dropped.sorted())
        try await refcounts.flush()
    }

    private mutating func store(
        _ bits: BitmapBits, at index: Int, _ image: Qcow2WritableImage,
        _ refcounts: inout Qcow2Refcounts
    ) async throws {
        let clusterSize = Int(image.geometry.clusterSize)
        var table: [UInt64] = []
        for start in stride(from: 0, to: bits.bytes.count, by: clusterSize) {
            var cluster = Array(bits.bytes[start..<min(bits.bytes.count, start + clusterSize)])
            if cluster.allSatisfy({ $0 == 0 }) {
                table.append(0)
                continue
            }
            cluster.appendZeros(upTo: clusterSize)
            let place = try await refcounts.takeInARow(1) * image.geometry.clusterSize
            try await image.writable.writeBytes(cluster, at: place)
            table.append(UInt64(place))
        }
        let count = Int64(table.count * 8).dividedUp(by: image.geometry.clusterSize)
        let place = try await refcounts.takeInARow(count) * image.geometry.clusterSize
        try await image.writable.writeWords(table, at: place)
        bitmaps[index].tableOffset = UInt64(place)
        bitmaps[index].tableEntries = UInt32(table.count)
    }

    private func placeDirectory(
        _ image: Qcow2WritableImage, _ refcounts: inout Qcow2Refcounts
    ) async throws -> Qcow2BitmapDirectory? {
        guard !bitmaps.isEmpty else { return nil }
        let bytes = bitmaps.flatMap(\.serialized)
        let count = Int64(bytes.count).dividedUp(by: image.geometry.clusterSize)
        let place = try await refcounts.takeInARow(count) * image.geometry.clusterSize
        try await image.writable.writeBytes(bytes, at: place)
        return Qcow2BitmapDirectory(
            count: bitmaps.count, offset: UInt64(place), size: UInt64(bytes.count))
    }

    /// The clusters of the old directory, and of the bitmaps that are removed or stored anew.
    private func replacedClusters(_ image: Qcow2WritableImage) async throws -> [Int64] {
        let clusterSize = image.geometry.clusterSize
        func clusters(_ offset: UInt64, _ bytes: Int64) -> Range<Int64> {
            let first = Int64(clamping: offset) / clusterSize
            return first..<first + bytes.dividedUp(by: clusterSize)
        }
        guard let directory else { return [] }
        var found = Array(clusters(directory.offset, Int64(directory.size)))
        for bitmap in stored
        where index(of: bitmap.nameBytes) == nil || bits[bitmap.nameBytes] != nil {
            found += clusters(bitmap.tableOffset, Int64(bitmap.tableEntries) * 8)
            for entry in try await Self.table(of: bitmap, image) {
                let offset = Int64(entry & Qcow2Entry.offsetMask)
                if offset != 0 { found.append(offset / clusterSize) }
            }
        }
        return found
    }
}

/// The bits of a bitmap in memory, lowest first in each byte.
struct BitmapBits: Sendable, Equatable {
    /// Length in bytes of the piece of disk that one bit stands for.
    let granularity: Int64
    private var count: Int64
    private(set) var bytes: [UInt8]

    /// - Parameter virtualSize: of the guest disk in bytes.
    /// - Throws: `ImageError` if there is not enough memory.
    init(_ virtualSize: Int64, _ granularity: Int64) throws(ImageError) {
        self.granularity = granularity
        count = virtualSize.dividedUp(by: granularity)
        let byteCount = Int(count.dividedUp(by: 8))
        try MemoryMargin.check(for: byteCount)
        bytes = [UInt8](repeating: 0, count: byteCount)
    }

    /// - Parameter virtualSize: of the guest disk in bytes.
    mutating func resize(to virtualSize: Int64) throws(ImageError) {
        var resized = try BitmapBits(virtualSize, granularity)
        let kept = min(bytes.count, resized.bytes.count)
        resized.bytes.replaceSubrange(0..<kept, with: bytes[..<kept])
        // Bits behind the end would be set when the disk grows again.
        if resized.count % 8 != 0, !resized.bytes.isEmpty {
            resized.bytes[resized.bytes.count - 1] &= 1 << UInt8(resized.count % 8) - 1
        }
        self = resized
    }

    mutating func replace(_ part: Range<Int>, with new: [UInt8]) {
        bytes.replaceSubrange(part, with: new)
    }

    /// Sets the bits of all pieces that a range of the disk touches, in bytes.
    mutating func insert(_ range: Range<Int64>) {
        guard !range.isEmpty else { return }
        let end = min(count, range.upperBound.dividedUp(by: granularity))
        var bit = range.lowerBound / granularity
        while bit < end {
            if bit % 8 == 0, end - bit >= 8 {
                bytes[Int(bit / 8)] = 0xff
                bit += 8
            } else {
                bytes[Int(bit / 8)] |= 1 << UInt8(bit % 8)
                bit += 1
            }
        }
    }

    /// Sets the bits of all pieces that the other bitmap has set.
    mutating func merge(_ other: BitmapBits) {
        for (number, byte) in other.bytes.enumerated() where byte != 0 {
            for bit in 0..<8 where byte & 1 << UInt8(bit) != 0 {
                let start = Int64(number * 8 + bit) * other.granularity
                insert(start..<start + other.granularity)
            }
        }
    }
}
