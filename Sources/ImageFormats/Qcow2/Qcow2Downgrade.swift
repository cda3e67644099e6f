import DiskImage
import ImageStorage

/// Makes a version 3 image one of version 2, which has no clusters of zeros.
///
/// First such clusters get data, or nothing where there is no backing file: each step leaves a
/// valid image of version 3 with the same content, and leaked clusters at worst. Then the header
/// changes.
struct Qcow2Downgrade {
    /// Limit for the tables that wait for a commit, in bytes.
    private static let tablesLimit: Int64 = 8 << 20

    private let storage: any WritableStorage
    private var image: Qcow2WritableImage
    private var refcounts: Qcow2Refcounts
    private let snapshots: [Qcow2Snapshot]
    /// nil if the image is not encrypted.
    private let encryption: Qcow2Encryption?
    /// Changed tables that the file does not have yet, and the clusters that lose a reference with
    /// them, once for each reference.
    private var tables: [(place: HostOffset, words: [UInt64])] = []
    private var dropped: [Int64] = []
    /// Clusters that lose references and keep others, once for each reference to take away. The
    /// flags of the tables have to change with such a refcount.
    private var shared: [Int64] = []

    private var geometry: Qcow2Geometry { image.geometry }

    /// Reads all metadata.
    ///
    /// - Throws: `ImageError` in qemu-img's words if version 2 cannot have what the image has.
    init(_ storage: any WritableStorage, _ encryption: Qcow2Encryption? = nil) async throws {
        self.storage = storage
        self.encryption = encryption
        let header = try await Qcow2Header.read(from: storage)
        (image, refcounts) = try await Qcow2WritableImage.sound(
            storage, header)
        snapshots = try await Qcow2Snapshot.readAll(of: header, in: storage)
        try Self.check(header, snapshots)
    }

    private static func check(
        _ header: Qcow2Header, _ snapshots: [Qcow2Snapshot]
    ) throws(ImageError) {
        guard header.refcountBits == 16 else {
            throw .invalid("compat=0.10 requires refcount_bits=16")
        }
        guard !header.hasDataFile else {
            throw .invalid("Cannot downgrade an image with a data file")
        }
        guard header.bitmapDirectory == nil else {
            throw .invalid("Cannot downgrade an image with bitmaps: remove them first")
        }
        let size = header.geometry.virtualSize
        guard
            snapshots.allSatisfy({
                $0.diskSize ?? size == size && $0.facts.stateSize <= UInt64(UInt32.max)
            })
        else { throw .invalid("Internal snapshots prevent downgrade of image") }
        guard header.incompatibleFeatures == 0 else {
            throw .invalid(
                "Cannot downgrade an image with incompatible features "
                    + "0x\(String(header.incompatibleFeatures, radix: 16)) set")
        }
    }

    /// - Throws: `ImageError`.
    mutating func run() async throws {
        var seen: Set<Int64> = []
        for table in try await l1Tables() {
            for (index, entry) in table.enumerated() {
                let place = Int64(entry & Qcow2Entry.offsetMask)
                guard place != 0, seen.insert(place).inserted else { continue }
                try Task.checkCancellation()
                try await expand(HostOffset(place), at: Int64(index) * geometry.l2Entries)
                if Int64(tables.count) * geometry.clusterSize >= Self.tablesLimit {
                    try await commit()
                }
            }
        }
        try await commit()
        try await refcounts.flush()
        guard !shared.isEmpty else { return try await image.rewriteHeader(Self.makeVersion2) }
        try await Qcow2SnapshotEditor.edit(storage, image.header) {
            try await $0.release(shared, Self.makeVersion2)
        }
    }

    private static func makeVersion2(_ header: inout Qcow2Header) {
        header.version = 2
        header.compatibleFeatures = 0
        header.autoclearFeatures = 0
        header.bitmapExtension = nil
        header.otherExtensions.removeAll { $0.type == Qcow2Header.ExtensionType.featureNames }
        header.otherFields = []
    }

    /// The L1 tables of the disk and of all snapshots.
    private func l1Tables() async throws -> [[UInt64]] {
        var all = [image.l1]
        for snapshot in snapshots {
            let header = try image.header.of(snapshot, in: storage.name)
            all.append(
                try await storage.readWords(
                    at: header.l1Offset, bytes: header.l1Entries * 8, "L1 table of a snapshot"))
        }
        return all
    }

    /// Replaces the clusters of zeros in an L2 table. All disks that use the table have the same
    /// backing file, so it may be changed for all of them.
    ///
    /// - Parameter first: index of the table's first cluster on the guest disk.
    private mutating func expand(_ place: HostOffset, at first: Int64) async throws {
        var words = try await image.readTable(at: place)
        guard words.contains(where: Self.isZero) else { return }
        let references = try await refcounts.count(of: place.bytes / geometry.clusterSize)
        for index in words.indices where Self.isZero(words[index]) {
            let host = words[index] & Qcow2Entry.offsetMask
            if host != 0 {
                let cluster = Int64(host) / geometry.clusterSize
                dropped += repeatElement(cluster, count: Int(references))
            }
            words[index] =
                image.header.backingFile == nil
                ? 0 : try await zeroCluster(references, guest: first + Int64(index))
        }
        tables.append((place, words))
    }

    private static func isZero(_ entry: UInt64) -> Bool {
        entry & (Qcow2Entry.compressed | Qcow2Entry.zero) == Qcow2Entry.zero
    }

    /// Takes a cluster that reads as zeros.
    ///
    /// - Parameter guest: index of the cluster on the guest disk.
    /// - Returns: the entry that leads to it.
    private mutating func zeroCluster(
        _ references: UInt64, guest: Int64
    ) async throws -> UInt64 {
        let cluster = try await refcounts.take(upTo: 1).lowerBound
        for _ in 1..<references where try await !refcounts.raise([cluster]) {
            throw ImageError.invalid("Failed to turn zero into data clusters")
        }
        let start = cluster * geometry.clusterSize
        if let encryption {
            let zeros = [UInt8](repeating: 0, count: Int(geometry.clusterSize))
            try await storage.writeBytes(
                encryption.encrypted(zeros, host: start, guest: guest * geometry.clusterSize),
                at: start)
        } else {
            try await storage.zero(start..<start + geometry.clusterSize, mayUnmap: true)
        }
        return UInt64(start) | (references == 1 ? Qcow2Entry.copied : 0)
    }

    private mutating func commit() async throws {
        guard !tables.isEmpty else { return }
        try await refcounts.publish(in: &image)
        for (place, words) in tables { try await storage.writeWords(words, at: place.bytes) }
        try await storage.flush()
        tables = []
        try await releaseDropped()
    }

    /// Frees what has no reference any more.
    private mutating func releaseDropped() async throws {
        var free: [Int64] = []
        var rest = dropped.sorted()[...]
        while let cluster = rest.first {
            let group = rest.prefix { $0 == cluster }
            rest = rest.dropFirst(group.count)
            if try await refcounts.count(of: cluster) == UInt64(group.count) {
                free += group
            } else {
                shared += group
            }
        }
        try await refcounts.release(free)
        dropped = []
    }
}
