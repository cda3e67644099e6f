import DiskImage

/// The place of a compressed cluster's stream, from the L2 entry.
struct Qcow2CompressedCluster: Sendable, Equatable {
    let host: HostOffset
    /// Largest possible length of the stream in bytes. The entry counts whole 512-byte sectors, so
    /// the last stream of a file may have fewer bytes.
    let maximumLength: Int64

    /// - Parameter entry: an entry of an L2 table with the compressed flag.
    init(entry: UInt64, _ geometry: Qcow2Geometry) {
        let offsetBits = UInt64(geometry.compressedOffsetBits)
        let offset = Int64(entry & ((1 << offsetBits) - 1))
        let furtherSectors = Int64((entry & (Qcow2Entry.compressed - 1)) >> offsetBits)
        host = HostOffset(offset)
        maximumLength = (furtherSectors + 1) * 512 - offset % 512
    }
}

/// The state of one cluster or subcluster and its place in the file, from the L2 entries. A zero or
/// unallocated cluster can have a place, too, which has never been written to.
enum Qcow2EntryState: Sendable, Equatable {
    case unallocated(HostOffset?)
    case zero(HostOffset?)
    case standard(HostOffset)
    /// - Parameter entry: the first word of the L2 entry.
    case compressed(_ entry: UInt64)
}

/// Turns L2 entries into mappings. Pure.
///
/// Source: QEMU's docs/interop/qcow2.txt, sections "L2 table entry" and "Extended L2 entries".
struct Qcow2EntryDecoder: Sendable {
    let name: String
    let version: Int
    let geometry: Qcow2Geometry

    /// The mappings from a guest offset on, as far as these entries tell them.
    ///
    /// - Parameters:
    ///   - words: consecutive L2 entries (two words each if extended), not empty.
    ///   - wordsStart: guest offset in bytes of the disk that the first entry maps.
    ///   - offset: guest offset in bytes, within the range of the entries.
    ///   - limit: end of the answer at the latest.
    /// - Throws: `ImageError` if the first entry is damaged. Damage further on ends the answer.
    /// - Returns: at most `Mapping.mostAtOnce` mappings. The bytes of each, or the places of its
    ///   zeros, follow each other in the file; a compressed cluster has a mapping of its own.
    func mappings(
        in words: [UInt64], startingAt wordsStart: Int64, from offset: Int64, limit: Int64
    ) throws(ImageError) -> [Mapping] {
        let end = min(
            limit,
            wordsStart + Int64(words.count) / geometry.wordsPerL2Entry * geometry.clusterSize)
        var result: [Mapping] = []
        var position = offset
        while position < end, result.count < Mapping.mostAtOnce {
            let state: Qcow2EntryState
            do throws(ImageError) {
                state = try self.state(words, wordsStart, position)
            } catch {
                if result.isEmpty { throw error }
                break
            }
            let stateEnd =
                if case .compressed = state {
                    (position + 1).roundedUp(to: geometry.clusterSize)
                } else if geometry.hasExtendedL2 {
                    endOfSubclusters(state, words, wordsStart, position, end)
                } else {
                    endOfClusters(words, wordsStart, position)
                }
            result.append(mapping(position..<min(stateEnd, end), state))
            position = result[result.count - 1].range.upperBound
        }
        return result
    }

    private func mapping(_ range: Range<Int64>, _ state: Qcow2EntryState) -> Mapping {
        switch state {
        case .unallocated(let host): return Mapping(range, .unallocated, hostOffset: host?.bytes)
        case .zero(let host): return Mapping(range, .zero, hostOffset: host?.bytes)
        case .standard(let host): return Mapping(range, .data, hostOffset: host.bytes)
        case .compressed(let entry):
            let stream = Qcow2CompressedCluster(entry: entry, geometry)
            var mapping = Mapping(range, .compressed)
            mapping.host = stream.host.bytes..<stream.host.bytes + stream.maximumLength
            return mapping
        }
    }

    private func endOfSubclusters(
        _ first: Qcow2EntryState, _ words: [UInt64], _ wordsStart: Int64, _ offset: Int64,
        _ end: Int64
    ) -> Int64 {
        let step = geometry.subclusterSize
        var position = (offset + 1).roundedUp(to: step)
        while position < end {
            guard let next = try? state(words, wordsStart, position),
                Self.continues(first, by: position - offset, with: next)
            else { break }
            position += step
        }
        return position
    }

    private static func continues(
        _ first: Qcow2EntryState, by distance: Int64, with next: Qcow2EntryState
    ) -> Bool {
        switch (first, next) {
        case (.standard(let start), .standard(let host)): host == start + distance
        case (.zero(let start), .zero(let host)),
            (.unallocated(let start), .unallocated(let host)):
            host == start.map { $0 + distance }
        default: false
        }
    }

    /// The guest offset at which a state ends in a table without subclusters. Whole entries are
    /// compared, because an image of terabytes has millions of them: each entry equals the first
    /// one, or is a cluster further than its predecessor.
    private func endOfClusters(
        _ words: [UInt64], _ wordsStart: Int64, _ offset: Int64
    ) -> Int64 {
        let start = Int((offset - wordsStart) / geometry.clusterSize)
        var index = start + 1
        let word = words[start] & ~Qcow2Entry.copied
        let hasHost = word & Qcow2Entry.offsetMask != 0
        let step = hasHost ? UInt64(geometry.clusterSize) : 0
        var expected = word &+ step
        while index < words.count, words[index] & ~Qcow2Entry.copied == expected {
            index += 1
            expected &+= step
        }
        return wordsStart + Int64(index) * geometry.clusterSize
    }

    /// The state of the cluster or subcluster at a guest offset.
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

    /// Decodes the bitmap of an extended entry: bits 0 to 31 say "allocated", bits 32 to 63 "reads
    /// as zeros". A subcluster cannot be both.
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

    /// The host cluster of an entry; nil if the entry names none.
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
