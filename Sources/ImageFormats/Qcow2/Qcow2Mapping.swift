import DiskImage

/// Where the guest's bytes of one cluster or subcluster are.
enum Qcow2Mapping: Sendable, Equatable {
    /// Not in this image: the backing file decides.
    case unallocated
    case zero
    /// As they are, from this host offset on.
    case standard(HostOffset)
    /// One compressed stream.
    case compressed(Qcow2CompressedCluster)
}

/// What the L2 entry of a compressed cluster says.
struct Qcow2CompressedCluster: Sendable, Equatable {
    let host: HostOffset
    /// The stream ends within this many bytes: the entry counts whole 512-byte sectors, so the last
    /// stream of a file may have fewer.
    let maximumLength: Int64

    /// - Parameter entry: of an L2 table, with its compressed flag.
    init(entry: UInt64, _ geometry: Qcow2Geometry) {
        let offsetBits = UInt64(geometry.compressedOffsetBits)
        let offset = Int64(entry & ((1 << offsetBits) - 1))
        let furtherSectors = Int64((entry & (Qcow2Entry.compressed - 1)) >> offsetBits)
        host = HostOffset(offset)
        maximumLength = (furtherSectors + 1) * 512 - offset % 512
    }
}

/// A stretch of guest disk with one mapping; a standard one is contiguous in the host, too, and a
/// compressed one lies within one cluster.
struct Qcow2Run: Sendable, Equatable {
    var range: Range<Int64>
    var mapping: Qcow2Mapping
}

/// What L2 entries say of one cluster or subcluster, and where in the file it lies. What is zero or
/// unallocated can have a place, too, that nobody has written to.
enum Qcow2EntryState: Sendable, Equatable {
    case unallocated(HostOffset?)
    case zero(HostOffset?)
    case standard(HostOffset)
    /// - Parameter entry: the first word of the L2 entry.
    case compressed(_ entry: UInt64)
}

/// Reads L2 entries. Pure.
///
/// Source: QEMU's docs/interop/qcow2.txt, sections "L2 table entry" and "Extended L2 entries".
struct Qcow2EntryDecoder: Sendable {
    let name: String
    let version: Int
    let geometry: Qcow2Geometry

    /// The longest run from `offset` on that these entries tell of.
    ///
    /// - Parameters:
    ///   - words: consecutive L2 entries (two words each if extended), not empty.
    ///   - wordsStart: the guest offset that the first entry maps.
    ///   - offset: where the run begins, within what the entries map.
    ///   - limit: where it ends at the latest.
    func run(
        in words: [UInt64], startingAt wordsStart: Int64, from offset: Int64, limit: Int64
    ) throws(ImageError) -> Qcow2Run {
        let step = geometry.subclusterSize
        let first = try mapping(words, wordsStart, offset)
        let end = min(
            limit,
            wordsStart + Int64(words.count) / geometry.wordsPerL2Entry * geometry.clusterSize)
        if case .compressed = first {
            // A stream is one cluster, though its neighbour may have the same one.
            let cluster = (offset + 1).roundedUp(to: geometry.clusterSize)
            return Qcow2Run(range: offset..<min(cluster, end), mapping: first)
        }
        var position = (offset + 1).roundedUp(to: step)
        while position < end {
            let next = try mapping(words, wordsStart, position)
            guard Self.continues(first, by: position - offset, with: next) else { break }
            position += step
        }
        return Qcow2Run(range: offset..<min(position, end), mapping: first)
    }

    private static func continues(
        _ first: Qcow2Mapping, by distance: Int64, with next: Qcow2Mapping
    ) -> Bool {
        switch (first, next) {
        case (.unallocated, .unallocated), (.zero, .zero): true
        case (.standard(let start), .standard(let host)): host == start + distance
        default: false
        }
    }

    private func mapping(
        _ words: [UInt64], _ wordsStart: Int64, _ offset: Int64
    ) throws(ImageError) -> Qcow2Mapping {
        switch try state(words, wordsStart, offset) {
        case .unallocated: return .unallocated
        case .zero: return .zero
        case .standard(let host): return .standard(host)
        case .compressed(let entry):
            return .compressed(Qcow2CompressedCluster(entry: entry, geometry))
        }
    }

    /// What the entries say of the cluster or subcluster at a guest offset.
    func state(
        _ words: [UInt64], _ wordsStart: Int64, _ offset: Int64
    ) throws(ImageError) -> Qcow2EntryState {
        let index = Int((offset - wordsStart) / geometry.clusterSize * geometry.wordsPerL2Entry)
        let entry = words[index]
        let inCluster = offset % geometry.clusterSize
        if entry & Qcow2Entry.compressed != 0 {
            guard !geometry.hasExtendedL2 || words[index + 1] == 0 else {
                throw corrupt(offset, "a compressed cluster has subclusters")
            }
            return .compressed(entry)
        }
        let flags = geometry.hasExtendedL2 ? 0 : Qcow2Entry.zero
        guard entry & ~(Qcow2Entry.copied | Qcow2Entry.offsetMask | flags) == 0 else {
            throw corrupt(offset, "reserved bits are set")
        }
        let host = try hostOffset(entry, offset).map { $0 + inCluster }
        if geometry.hasExtendedL2 {
            return try subclusterState(words[index + 1], host, offset, inCluster)
        }
        if entry & Qcow2Entry.zero != 0 {
            guard version >= 3 else { throw corrupt(offset, "zero flag in a version 2 image") }
            return .zero(host)
        }
        return host.map { .standard($0) } ?? .unallocated(nil)
    }

    /// Bits 0 to 31 of the bitmap: allocated; 32 to 63: reads as zeros. Not both.
    private func subclusterState(
        _ bitmap: UInt64, _ host: HostOffset?, _ offset: Int64, _ inCluster: Int64
    ) throws(ImageError) -> Qcow2EntryState {
        let bit = UInt64(inCluster / geometry.subclusterSize)
        let isAllocated = bitmap & (1 << bit) != 0
        let isZero = bitmap & (1 << (bit + 32)) != 0
        switch (isAllocated, isZero) {
        case (true, true): throw corrupt(offset, "a subcluster is both allocated and zero")
        case (false, true): return .zero(host)
        case (false, false): return .unallocated(host)
        case (true, false):
            guard let host else { throw corrupt(offset, "an allocated subcluster has no cluster") }
            return .standard(host)
        }
    }

    /// nil where the entry names no host cluster.
    private func hostOffset(
        _ entry: UInt64, _ guestOffset: Int64
    ) throws(ImageError) -> HostOffset? {
        let bytes = Int64(entry & Qcow2Entry.offsetMask)
        guard bytes % geometry.clusterSize == 0 else {
            throw corrupt(guestOffset, "host offset \(bytes) is not a multiple of the cluster size")
        }
        return bytes == 0 ? nil : HostOffset(bytes)
    }

    private func corrupt(_ guestOffset: Int64, _ reason: String) -> ImageError {
        .corrupt(name, "bad L2 entry for guest offset \(guestOffset): \(reason)")
    }
}
