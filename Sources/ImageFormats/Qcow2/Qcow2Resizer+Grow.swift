import DiskImage
import ImageStorage

// New clusters come behind the end of the image: first everything is written there, then led to.
extension Qcow2Resizer {
    /// What changes, collected until all of it is written.
    private struct Growth {
        let size: Int64
        let geometry: Qcow2Geometry
        let preallocation: Preallocation
        /// The clusters that are new, by their numbers on the guest disk.
        var new: Range<Int64>
        /// Where those end that would show the backing file.
        var hiddenEnd: Int64
        /// The last old cluster, if it has to be written anew: its place.
        var tail: (guestCluster: Int64, host: Int64)?
        /// What nothing leads to any more at the end.
        var freed: [Int64] = []
    }

    mutating func grow(to size: Int64, _ preallocation: Preallocation) async throws {
        var growth = try plan(size, preallocation)
        var hasReferences = false
        do {
            // Taken first: behind all that is new it would keep the file from getting shorter again.
            let movedL1 = try await placeForL1(&growth)
            try await hideTail(&growth)
            try await writeTables(&growth)
            if let movedL1 { try await storage.write(l1.bigEndianBytes, at: movedL1.bytes) }
            try await refcounts.flush()
            hasReferences = true
            try await refer(growth, movedL1)
        } catch {
            // Nothing leads to what was taken: it need not be lost.
            if !hasReferences { try? await refcounts.undoAllocations() }
            throw error
        }
        try await release(growth.freed)
        try await refcounts.flush()
    }

    private func plan(
        _ size: Int64, _ preallocation: Preallocation
    ) throws(ImageError) -> Growth {
        let geometry = geometry(virtualSize: size)
        guard geometry.l1Entries <= Qcow2Header.maximumL1Entries else {
            throw .tooLarge("Failed to grow the L1 table")
        }
        let first = self.geometry.virtualSize.dividedUp(by: geometry.clusterSize)
        let end = size.dividedUp(by: geometry.clusterSize)
        let below = min(size, backing?.virtualSize ?? 0).dividedUp(by: geometry.clusterSize)
        guard header.version >= 3 || below <= first || preallocation != .off else {
            throw .invalid("Failed to zero out new clusters: Operation not supported")
        }
        return Growth(
            size: size, geometry: geometry, preallocation: preallocation, new: first..<end,
            hiddenEnd: max(first, below))
    }

    // MARK: The last old cluster

    /// The disk may end within a cluster: what that has behind the end, or the backing file, must not
    /// show now.
    private mutating func hideTail(_ growth: inout Growth) async throws {
        let clusterSize = geometry.clusterSize
        let oldSize = geometry.virtualSize
        let cluster = oldSize / clusterSize
        let inCluster = Int(oldSize % clusterSize)
        guard inCluster > 0 else { return }
        var content = try await contentOfLastCluster(cluster)
        guard content[inCluster...].contains(where: { $0 != 0 }) else { return }
        for place in inCluster..<content.count { content[place] = 0 }

        let entry = try await entry(of: cluster)
        if let host = try await ownCluster(entry) {
            return try await storage.write(
                Array(content[inCluster...]), at: host + Int64(inCluster))
        }
        let host = try await refcounts.allocate(1)
        try await storage.write(content, at: host * clusterSize)
        growth.tail = (cluster, host)
        growth.freed += clusters(of: entry)
    }

    /// As the guest would see it if nothing but the size were changed.
    private func contentOfLastCluster(_ cluster: Int64) async throws -> [UInt8] {
        var grown = header
        grown.geometry = geometry(virtualSize: (cluster + 1) * geometry.clusterSize)
        var layers: [any ImageSource] = [try await Qcow2Source(storage, header: grown)]
        if let backing { layers.append(backing) }
        var buffer = try IOBuffer(byteCount: Int(geometry.clusterSize))
        var span = buffer.mutableBytes
        try await LayeredSource(layers: layers).read(
            into: &span, at: cluster * geometry.clusterSize)
        return buffer.bytes.withUnsafeBytes { Array($0) }
    }

    private func entry(of cluster: Int64) async throws -> ArraySlice<UInt64> {
        let words = try await readTable(cluster / geometry.l2Entries)
        let step = Int(geometry.wordsPerL2Entry)
        let start = Int(cluster % geometry.l2Entries) * step
        return words[start..<start + step]
    }

    /// Where a cluster's bytes may be changed: whole, plain, and nobody else's.
    private mutating func ownCluster(_ entry: ArraySlice<UInt64>) async throws -> Int64? {
        guard let word = entry.first, !geometry.hasExtendedL2,
            word & (Qcow2Entry.compressed | Qcow2Entry.zero) == 0,
            case let host = Int64(word & Qcow2Entry.offsetMask), host != 0,
            try await refcounts.count(of: host / geometry.clusterSize) == 1
        else { return nil }
        return host
    }

    // MARK: New tables

    /// Writes the L2 tables that change, all to new places, and what they preallocate.
    private mutating func writeTables(_ growth: inout Growth) async throws {
        let entries = geometry.l2Entries
        let touchedEnd =
            growth.preallocation == .off ? growth.hiddenEnd : growth.new.upperBound
        let first = growth.tail?.guestCluster ?? growth.new.lowerBound
        let end = max(touchedEnd, growth.tail.map { $0.guestCluster + 1 } ?? first)
        if growth.preallocation.takesBlocks {
            try storage.requireSpace(Int64(growth.new.count) * geometry.clusterSize)
        }
        guard first < end else { return }
        for table in first / entries...(end - 1) / entries {
            try Task.checkCancellation()
            let range = table * entries..<(table + 1) * entries
            let changed = growth.new.clamped(to: range).clamped(to: first..<max(first, touchedEnd))
            try await writeTable(table, changed, &growth)
        }
    }

    private mutating func writeTable(
        _ index: Int64, _ changed: Range<Int64>, _ growth: inout Growth
    ) async throws {
        let old = try tableOffset(index)
        var words = try await readTable(index)
        let data = growth.preallocation == .off ? 0 : Int64(changed.count)
        let first = try await refcounts.allocate(1 + data)
        let step = Int(geometry.wordsPerL2Entry)
        func place(of cluster: Int64) -> Int { Int(cluster % geometry.l2Entries) * step }
        for (number, cluster) in zip((first + 1)..., changed) {
            let word = place(of: cluster)
            growth.freed += clusters(of: words[word..<word + step])
            let isHidden = cluster < growth.hiddenEnd
            let host =
                data > 0 ? UInt64(number * geometry.clusterSize) | Qcow2Entry.copied : 0
            if geometry.hasExtendedL2 {
                words[word] = host
                words[word + 1] = isHidden ? Qcow2Entry.allSubclustersZero : 0
            } else {
                // Version 2 knows no zero clusters: there it is new ones that read as zeros.
                let flag = isHidden && header.version >= 3 ? Qcow2Entry.zero : 0
                words[word] = host | flag
            }
        }
        if let tail = growth.tail, tail.guestCluster / geometry.l2Entries == index {
            let word = place(of: tail.guestCluster)
            words[word] = UInt64(tail.host * geometry.clusterSize) | Qcow2Entry.copied
            if geometry.hasExtendedL2 { words[word + 1] = Qcow2Entry.allSubclustersAllocated }
        }
        if data > 0 { try await fill(first + 1..<first + 1 + data, growth.preallocation) }
        try await storage.write(words.bigEndianBytes, at: first * geometry.clusterSize)
        l1[Int(index)] = UInt64(first * geometry.clusterSize) | Qcow2Entry.copied
        if let old { growth.freed.append(old.bytes / geometry.clusterSize) }
    }

    /// Makes new clusters read as zeros, and takes their blocks if that is asked for.
    private func fill(_ clusters: Range<Int64>, _ preallocation: Preallocation) async throws {
        let range =
            clusters.lowerBound * geometry.clusterSize..<clusters.upperBound * geometry.clusterSize
        if storage.traits.isDevice {
            guard preallocation == .metadata else {
                throw ImageError.invalid(
                    "Preallocation mode '\(preallocation.rawValue)' unsupported for this "
                        + "non-regular file")
            }
            return try await storage.zero(range, mayUnmap: true)
        }
        if storage.size < range.upperBound { try await storage.truncate(to: range.upperBound) }
        switch preallocation {
        case .off, .metadata: break
        case .falloc: try storage.allocate(range, .falloc)
        case .full: try await storage.writeZeros(range)
        }
    }

    // MARK: What leads to it

    /// Takes a new place for the L1 table if it has to be larger than the old one.
    private mutating func placeForL1(_ growth: inout Growth) async throws -> HostOffset? {
        let needed = growth.geometry.l1Entries
        guard needed > header.l1Entries else { return nil }
        l1.append(contentsOf: repeatElement(0, count: Int(needed) - l1.count))
        let count = (needed * 8).dividedUp(by: geometry.clusterSize)
        let host = HostOffset(try await refcounts.allocate(count) * geometry.clusterSize)
        let oldStart = header.l1Offset.bytes / geometry.clusterSize
        let oldCount = (header.l1Entries * 8).dividedUp(by: geometry.clusterSize)
        growth.freed += oldStart..<oldStart + oldCount
        return host
    }

    /// The moment at which the image has its new size: one write, within a sector.
    private func refer(_ growth: Growth, _ movedL1: HostOffset?) async throws {
        guard let movedL1 else {
            try await writeL1(l1.indices)
            try await storage.flush()
            try await writeSize(growth.size)
            return try await storage.flush()
        }
        var fields: [UInt8] = []
        fields.appendBigEndian(UInt64(growth.size))
        fields.appendBigEndian(UInt32(0))  // encryption: none
        fields.appendBigEndian(UInt32(l1.count))
        fields.appendBigEndian(UInt64(movedL1.bytes))
        try await storage.write(fields, at: Qcow2Header.FieldOffset.virtualSize)
        try await storage.flush()
    }
}
