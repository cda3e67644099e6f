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

    /// The L2 entry for a stream.
    ///
    /// - Parameter length: in bytes, not 0.
    static func entry(_ host: HostOffset, length: Int64, _ geometry: Qcow2Geometry) -> UInt64 {
        let furtherSectors = UInt64((host.bytes + length - 1) / 512 - host.bytes / 512)
        return Qcow2Entry.compressed | furtherSectors << UInt64(geometry.compressedOffsetBits)
            | UInt64(host.bytes)
    }
}

/// Turns L2 entries into mappings. Pure.
///
/// Source: QEMU's docs/interop/qcow2.txt, sections "L2 table entry" and "Extended L2 entries".
struct Qcow2EntryDecoder: Sendable {
    let name: String
    let version: Int
    let geometry: Qcow2Geometry
    /// Whether the data lies in another file, each cluster at its guest offset.
    var hasDataFile = false

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
            var mapping: Mapping
            do throws(ImageError) {
                mapping = try self.mapping(words, wordsStart, position)
            } catch {
                if result.isEmpty { throw error }
                break
            }
            if mapping.content != .compressed {
                let runEnd =
                    geometry.hasExtendedL2
                    ? endOfSubclusters(mapping, words, wordsStart, end)
                    : endOfClusters(mapping, words, wordsStart)
                mapping = Mapping(
                    position..<runEnd, mapping.content, hostOffset: mapping.host?.lowerBound)
            }
            result.append(mapping.clipped(to: position..<end))
            position = mapping.range.upperBound
        }
        return result
    }

    private func endOfSubclusters(
        _ first: Mapping, _ words: [UInt64], _ wordsStart: Int64, _ end: Int64
    ) -> Int64 {
        var position = first.range.upperBound
        while position < end, let next = try? mapping(words, wordsStart, position),
            next.content == first.content,
            next.host?.lowerBound
                == first.host.map({ $0.lowerBound + position - first.range.lowerBound })
        {
            position = next.range.upperBound
        }
        return position
    }

    /// The guest offset at which a mapping ends in a table without subclusters. Whole entries are
    /// compared, because an image of terabytes has millions of them: each entry equals the first
    /// one, or is a cluster further than its predecessor.
    private func endOfClusters(
        _ first: Mapping, _ words: [UInt64], _ wordsStart: Int64
    ) -> Int64 {
        let start = Int((first.range.lowerBound - wordsStart) / geometry.clusterSize)
        var index = start + 1
        // In an image with a data file, the flag tells whether the first cluster is allocated.
        let ignored = hasDataFile ? 0 : Qcow2Entry.copied
        let word = words[start] & ~ignored
        let step = first.host == nil ? 0 : UInt64(geometry.clusterSize)
        var expected = word &+ step
        while index < words.count, words[index] & ~ignored == expected {
            index += 1
            expected &+= step
        }
        return wordsStart + Int64(index) * geometry.clusterSize
    }

    /// The mapping of the cluster or subcluster at a guest offset, from that offset on. A zero or
    /// unallocated cluster can have a place, too, which has never been written to.
    private func mapping(
        _ words: [UInt64], _ wordsStart: Int64, _ offset: Int64
    ) throws(ImageError) -> Mapping {
        let index = Int((offset - wordsStart) / geometry.clusterSize * geometry.wordsPerL2Entry)
        let entry = words[index]
        let inCluster = offset % geometry.clusterSize
        if entry & Qcow2Entry.compressed != 0 {
            guard !geometry.hasExtendedL2 || words[index + 1] == 0 else {
                throw corrupt(offset, "a compressed cluster has subclusters")
            }
            guard !hasDataFile else {
                throw corrupt(offset, "a compressed cluster in an image with a data file")
            }
            let stream = Qcow2CompressedCluster(entry: entry, geometry)
            let end = (offset + 1).roundedUp(to: geometry.clusterSize)
            var mapping = Mapping(offset..<end, .compressed)
            mapping.host = stream.host.bytes..<stream.host.bytes + stream.maximumLength
            return mapping
        }
        let flags = geometry.hasExtendedL2 ? 0 : Qcow2Entry.zero
        guard entry & ~(Qcow2Entry.copied | Qcow2Entry.offsetMask | flags) == 0 else {
            throw corrupt(offset, "reserved bits are set")
        }
        let host = try hostOffset(entry, offset)
        let content: Mapping.Content
        if geometry.hasExtendedL2 {
            content = try subclusterContent(words[index + 1], host, offset, inCluster)
        } else if entry & Qcow2Entry.zero != 0 {
            guard version >= 3 else { throw corrupt(offset, "zero flag in a version 2 image") }
            content = .zero
        } else {
            content = host == nil ? .unallocated : .data
        }
        let end = (offset + 1).roundedUp(to: geometry.subclusterSize)
        return Mapping(offset..<end, content, hostOffset: host.map { $0.bytes + inCluster })
    }

    /// Decodes the bitmap of an extended entry: bits 0 to 31 say "allocated", bits 32 to 63 "reads
    /// as zeros". A subcluster cannot be both.
    private func subclusterContent(
        _ bitmap: UInt64, _ host: HostOffset?, _ offset: Int64, _ inCluster: Int64
    ) throws(ImageError) -> Mapping.Content {
        let bit = UInt64(inCluster / geometry.subclusterSize)
        let isAllocated = bitmap & (1 << bit) != 0
        let isZero = bitmap & (1 << (bit + 32)) != 0
        switch (isAllocated, isZero) {
        case (true, true): throw corrupt(offset, "a subcluster is both allocated and zero")
        case (false, true): return .zero
        case (false, false): return .unallocated
        case (true, false):
            guard host != nil else {
                throw corrupt(offset, "an allocated subcluster has no cluster")
            }
            return .data
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
        guard hasDataFile else { return bytes == 0 ? nil : HostOffset(bytes) }
        // The first cluster of a data file is at offset 0, so only the flag shows that it is
        // allocated.
        let isZero = !geometry.hasExtendedL2 && entry & Qcow2Entry.zero != 0
        guard bytes != 0 || (entry & Qcow2Entry.copied != 0 && !isZero) else { return nil }
        guard bytes == guestOffset.roundedDown(to: geometry.clusterSize) else {
            throw corrupt(
                guestOffset, "offset \(bytes) in the data file is not that of the guest's cluster")
        }
        return HostOffset(bytes)
    }

    private func corrupt(_ guestOffset: Int64, _ reason: String) -> ImageError {
        .corrupt(name, "bad L2 entry for guest offset \(guestOffset): \(reason)")
    }
}
