import DiskImage
import ImageStorage

/// A qcow2 image that is changed where it stands: its storage, its header and its active L1 table
/// as they are on disk, and the ways to change each of them (docs/architecture.md, "Changing an
/// image in place").
///
/// Verbs decide what to change. This type knows the places of the parts and the order of writes:
/// new structures, a flush, one write to the header, a flush. It is the only one that writes
/// headers and L1 tables.
struct Qcow2WritableImage: Sendable {
    let storage: any Storage
    /// The header on disk; the older one while `isSwitched` leaves two possible.
    private(set) var header: Qcow2Header
    /// All entries that the header names, which can be more than the disk needs; of a damaged image
    /// those up to the end of the file. Changed entries are on disk after `writeL1`.
    var l1: [UInt64]
    /// Whether the header on disk may be another one than at first, so that new structures must not
    /// be taken back.
    private(set) var isSwitched = false
    /// nil if the image is only looked at.
    private let target: (any WritableStorage)?

    var geometry: Qcow2Geometry { header.geometry }

    /// The storage to write to.
    ///
    /// - Throws: `ImageError` if the image is open for reading only.
    var writable: any WritableStorage {
        get throws(ImageError) {
            guard let target else { throw .unsupported(storage.name, "is open for reading only") }
            return target
        }
    }
}

// MARK: Opening

extension Qcow2WritableImage {
    /// Opens an image to check it. Whatever can be read of its L1 table is taken.
    ///
    /// - Throws: `ImageError` if the storage holds no qcow2 image, or one that is too damaged.
    static func examining(_ storage: any Storage) async throws -> Qcow2WritableImage {
        try await Qcow2WritableImage(examining: storage, target: nil)
    }

    /// Opens an image to repair it; see `examining`.
    static func damaged(_ storage: any WritableStorage) async throws -> Qcow2WritableImage {
        try await Qcow2WritableImage(examining: storage, target: storage)
    }

    private init(examining storage: any Storage, target: (any WritableStorage)?) async throws {
        self.storage = storage
        self.target = target
        header = try await Qcow2Header.read(from: storage, for: .checking)
        l1 = try await storage.readWords(at: header.l1Offset.bytes, count: header.l1Entries)
    }

    /// Opens an image without errors, with the refcounts that tell which clusters are free. A
    /// damaged image has none that could be relied upon.
    ///
    /// - Parameter header: as it was read.
    /// - Throws: `ImageError` for images that have errors.
    static func sound(
        _ storage: any WritableStorage, _ header: Qcow2Header
    ) async throws -> (image: Qcow2WritableImage, refcounts: Qcow2Refcounts) {
        try header.requireWritable(storage.name)
        return try await opened(try await SoundImage(storage), storage)
    }

    /// - Throws: `ImageError` if the file ends within a table.
    static func opened(
        _ sound: SoundImage, _ storage: any WritableStorage
    ) async throws -> (image: Qcow2WritableImage, refcounts: Qcow2Refcounts) {
        let header = sound.header
        let refcounts = try Qcow2Refcounts(sound, storage: storage)
        let l1 = try await storage.readWords(
            at: header.l1Offset, bytes: header.l1Entries * 8, "L1 table")
        let image = Qcow2WritableImage(storage: storage, header: header, l1: l1, target: storage)
        for index in l1.indices {
            guard let table = try image.tableOffset(Int64(index)) else { continue }
            guard table.bytes <= storage.size - header.geometry.clusterSize else {
                throw ImageError.corrupt(
                    storage.name,
                    "the L2 table at offset \(table.bytes) lies beyond the end of the file "
                        + "(\(storage.size) bytes): the image is cut short or damaged")
            }
        }
        return (image, refcounts)
    }
}

extension Qcow2Header {
    /// - Parameter name: of the image.
    /// - Throws: `ImageError` if the image says that it must not be changed.
    func requireWritable(_ name: String) throws(ImageError) {
        if incompatibleFeatures & IncompatibleFeature.corrupt != 0 {
            throw .corrupt(name, "Image is corrupt; cannot be opened read/write")
        }
        if incompatibleFeatures & IncompatibleFeature.dirty != 0 {
            throw .unsupported(
                name, "the image was not closed cleanly: repair it first (check -r all)")
        }
    }
}

// MARK: The header

extension Qcow2WritableImage {
    /// Makes the header lead to new structures by one write within a sector, after all that was
    /// written before is on stable storage. Bits of features that are void after a change by a
    /// program that does not know them are cleared (spec, "autoclear_features").
    ///
    /// - Throws: `ImageError`. If the header cannot be written, the old one is restored, so that
    ///   new structures can be taken back. If that fails as well, either header may be on disk, and
    ///   both lead to a valid image.
    mutating func changeHeader(_ change: (inout Qcow2Header) -> Void) async throws {
        try await replaceHeader(change) { (Qcow2Header.changeableOffset, $0.changeableFields) }
    }

    /// Clears bits of features that are void from the first change on by a program that does not
    /// know them.
    mutating func clearUnknownFeatures() async throws {
        guard header.autoclearFeatures & ~Qcow2Header.AutoclearFeature.known != 0 else { return }
        try await changeHeader { _ in }
    }

    /// Writes the whole header, with extensions and names. As `changeHeader`, but that the write
    /// can be longer than a sector.
    ///
    /// - Throws: `ImageError`; also if the names do not fit into a cluster, before anything is
    ///   written.
    mutating func rewriteHeader(_ change: (inout Qcow2Header) -> Void) async throws {
        try await replaceHeader(change) { (0, try $0.serialized()) }
    }

    private mutating func replaceHeader(
        _ change: (inout Qcow2Header) -> Void,
        _ serialize: (Qcow2Header) throws -> (offset: Int64, bytes: [UInt8])
    ) async throws {
        var new = header
        change(&new)
        new.autoclearFeatures &= Qcow2Header.AutoclearFeature.known
        let (offset, bytes) = try serialize(new)
        let old = try serialize(header).bytes
        try await writable.flush()
        let wasSwitched = isSwitched
        isSwitched = true
        do {
            try await write(bytes, at: offset)
        } catch {
            if (try? await write(old, at: offset)) != nil { isSwitched = wasSwitched }
            throw error
        }
        header = new
    }

    private func write(_ bytes: [UInt8], at offset: Int64) async throws {
        try await writable.writeBytes(bytes, at: offset)
        try await writable.flush()
    }
}

// MARK: Tables

extension Qcow2WritableImage {
    /// The place of the L2 table of an L1 entry; nil if there is none.
    ///
    /// - Throws: `ImageError` if the entry is invalid.
    func tableOffset(_ index: Int64) throws(ImageError) -> HostOffset? {
        guard index < l1.count else { return nil }
        let entry = l1[Int(index)]
        let offset = Int64(entry & Qcow2Entry.offsetMask)
        guard entry & ~(Qcow2Entry.copied | Qcow2Entry.offsetMask) == 0,
            offset % geometry.clusterSize == 0
        else { throw .corrupt(storage.name, "L1 entry \(index) is invalid") }
        return offset == 0 ? nil : HostOffset(offset)
    }

    /// Whether the L2 table of an L1 entry is used only once, so that it may be changed where it
    /// stands.
    func isOwnTable(_ index: Int64) -> Bool {
        index < l1.count && l1[Int(index)] & Qcow2Entry.copied != 0
    }

    /// Reads the L2 table of an L1 entry as words; zeros if there is no table.
    func readTable(_ index: Int64) async throws -> [UInt64] {
        guard let host = try tableOffset(index) else {
            return [UInt64](repeating: 0, count: Int(geometry.clusterSize / 8))
        }
        return try await readTable(at: host)
    }

    func readTable(at host: HostOffset) async throws -> [UInt64] {
        try await storage.readWords(at: host, bytes: geometry.clusterSize, "L2 table")
    }

    /// Writes entries of `l1` to the table that the header names.
    func writeL1(_ indices: Range<Int>) async throws {
        guard !indices.isEmpty else { return }
        try await writable.writeWords(
            Array(l1[indices]), at: header.l1Offset.bytes + Int64(indices.lowerBound) * 8)
    }

    /// The host clusters that L2 entries refer to, once for each reference; those of a data file
    /// have no refcounts.
    func clusters(of words: ArraySlice<UInt64>) -> [Int64] {
        guard !header.hasDataFile else { return [] }
        var found: [Int64] = []
        let step = Int(geometry.wordsPerL2Entry)
        for index in stride(from: words.startIndex, to: words.endIndex, by: step) {
            let entry = words[index]
            if entry & Qcow2Entry.compressed != 0 {
                let stream = Qcow2CompressedCluster(entry: entry, geometry)
                let last = stream.host.bytes + stream.maximumLength - 1
                found += stream.host.bytes / geometry.clusterSize...last / geometry.clusterSize
            } else if entry & Qcow2Entry.offsetMask != 0 {
                found.append(Int64(entry & Qcow2Entry.offsetMask) / geometry.clusterSize)
            }
        }
        return found
    }
}
