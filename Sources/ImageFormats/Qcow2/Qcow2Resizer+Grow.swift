import DiskImage
import ImageStorage

// Growing: new clusters are written behind the end of the image before anything leads to them.
extension Qcow2Resizer {
    /// The plan for a larger disk.
    private struct Growth {
        let geometry: Qcow2Geometry
        let preallocation: Preallocation
        /// Indices of the new clusters on the guest disk.
        let new: Range<Int64>
        /// End of the new clusters that would show the backing file, as an index on the guest disk.
        let hiddenEnd: Int64
        /// The last old cluster, if the part behind the old end would show something.
        var tail: Tail?
        var change: Change
    }

    /// The last old cluster with the content that it has to get.
    private struct Tail {
        let guestCluster: Int64
        let content: [UInt8]
        /// Offset in bytes at which the cluster can be changed in place; nil if it has to move.
        let host: Int64?
    }

    mutating func grow(to size: Int64, _ preallocation: Preallocation) async throws {
        // The tables of an image with a raw data file must not hide what is there.
        let needsPlaces = header.isDataFileRaw && preallocation == .off
        var growth = try plan(size, needsPlaces ? .metadata : preallocation)
        growth.tail = try await tail()
        try await growData(growth)
        try await placeL1(&growth)
        try await writeTables(&growth)
        if growth.change.l1Offset != header.l1Offset {
            try await storage.writeWords(image.l1, at: growth.change.l1Offset.bytes)
        }
        try await hideTail(growth)
        try await allocateTail(growth)
        try await perform(&growth.change)
        try await refcounts.release(growth.change.freed)
        try await refcounts.flush()
    }

    private func plan(
        _ size: Int64, _ preallocation: Preallocation
    ) throws -> Growth {
        var geometry = geometry
        geometry.virtualSize = size
        guard geometry.l1Entries <= Qcow2Header.maximumL1Entries else {
            throw ImageError.tooLarge("Failed to grow the L1 table")
        }
        let first = self.geometry.virtualSize.dividedUp(by: geometry.clusterSize)
        let end = size.dividedUp(by: geometry.clusterSize)
        let below = min(size, backing?.virtualSize ?? 0).dividedUp(by: geometry.clusterSize)
        guard header.version >= 3 || below <= first || preallocation != .off else {
            throw ImageError.invalid("Failed to zero out new clusters: Operation not supported")
        }
        guard encryption == nil || preallocation == .off else {
            throw ImageError.invalid(
                "Preallocation of new space is not supported for encrypted images")
        }
        if preallocation.takesBlocks {
            guard !(data ?? storage).traits.isDevice else {
                throw ImageError.invalid(
                    "Preallocation mode '\(preallocation.rawValue)' unsupported for this "
                        + "non-regular file")
            }
            try (data ?? storage).requireSpace((end - first) * geometry.clusterSize)
        }
        return Growth(
            geometry: geometry, preallocation: preallocation, new: first..<end,
            hiddenEnd: max(first, below),
            change: Change(size: size, l1Offset: header.l1Offset))
    }

    // MARK: The last old cluster

    /// The last old cluster, if the disk ends within it and the cluster or the backing file has
    /// bytes behind the old end, which must not show now.
    private mutating func tail() async throws -> Tail? {
        let cluster = geometry.virtualSize / geometry.clusterSize
        let inCluster = Int(geometry.virtualSize % geometry.clusterSize)
        guard inCluster > 0 else { return nil }
        let entry = try await entry(of: cluster)
        let length = Int(geometry.clusterSize)
        if !hasNoise(behind: cluster, entry) {
            let behind = try await content(of: cluster, inCluster..<length)
            guard behind.contains(where: { $0 != 0 }) else { return nil }
        }
        let content =
            try await content(of: cluster, 0..<inCluster)
            + Array(repeating: 0, count: length - inCluster)
        return Tail(
            guestCluster: cluster, content: content, host: try await ownCluster(entry))
    }

    /// Whether an encrypted data file ends within a cluster that has a place there: what it is made
    /// longer by are zeros, which decrypt to noise.
    private func hasNoise(behind cluster: Int64, _ entry: ArraySlice<UInt64>) -> Bool {
        guard let data, encryption != nil, let word = entry.first, word & Qcow2Entry.copied != 0
        else { return false }
        return data.size < (cluster + 1) * geometry.clusterSize
    }

    /// Clears the tail of a cluster that stays in place. The guest does not see these bytes yet.
    private func hideTail(_ growth: Growth) async throws {
        guard let tail = growth.tail, let host = tail.host else { return }
        // The guest sees a part of the sector in which the disk ends, whose bytes stay the same.
        let inCluster =
            (geometry.virtualSize % geometry.clusterSize).roundedDown(to: guestSectorSize)
        let content = try stored(tail, at: host)
        try await write(content[Int(inCluster)...], at: host + inCluster)
    }

    /// Allocates the blocks of the last old cluster behind the old end of the disk, which can be a
    /// hole of the file.
    private mutating func allocateTail(_ growth: Growth) async throws {
        let cluster = geometry.virtualSize / geometry.clusterSize
        let start = (geometry.virtualSize % geometry.clusterSize).roundedUp(to: guestSectorSize)
        let end = growth.geometry.virtualSize - cluster * geometry.clusterSize
        guard growth.preallocation.takesBlocks, data == nil, growth.tail == nil, start > 0,
            start < min(end, geometry.clusterSize),
            let host = try await ownCluster(try await entry(of: cluster))
        else { return }
        try await fill(
            host + start..<host + min(end, geometry.clusterSize), growth.preallocation)
    }

    /// Writes data of the guest to its place. What lies behind the end of a data file is left out:
    /// a device cannot hold it.
    private func write(_ bytes: ArraySlice<UInt8>, at host: Int64) async throws {
        guard let data else { return try await storage.writeBytes(Array(bytes), at: host) }
        let room = max(0, data.size - host)
        try await data.writeBytes(Array(bytes.prefix(Int(room))), at: host)
    }

    /// The content of the last cluster as it has to be stored at an offset in bytes.
    private func stored(_ tail: Tail, at host: Int64) throws(ImageError) -> [UInt8] {
        guard let encryption else { return tail.content }
        return try encryption.encrypted(
            tail.content, host: host, guest: tail.guestCluster * geometry.clusterSize)
    }

    /// The content of the last cluster as the guest would see it if only the size changed.
    ///
    /// - Parameter part: in bytes from the start of the cluster. Most of the time nothing of the
    ///   backing file lies behind the end of the disk, so its secret is not needed.
    private func content(of cluster: Int64, _ part: Range<Int>) async throws -> [UInt8] {
        var grown = header
        grown.geometry.virtualSize = (cluster + 1) * geometry.clusterSize
        var layers: [any ImageSource] = [
            try await Qcow2Source(storage, header: grown, data: data, encryption: encryption)
        ]
        if let backing { layers.append(backing) }
        var buffer = try IOBuffer(byteCount: part.count)
        var span = buffer.mutableBytes
        try await LayeredSource(layers: layers).read(
            into: &span, at: cluster * geometry.clusterSize + Int64(part.lowerBound))
        return buffer.bytes.withUnsafeBytes { Array($0) }
    }

    private func entry(of cluster: Int64) async throws -> ArraySlice<UInt64> {
        let words = try await image.readTable(cluster / geometry.l2Entries)
        let step = Int(geometry.wordsPerL2Entry)
        let start = Int(cluster % geometry.l2Entries) * step
        return words[start..<start + step]
    }

    /// The offset in bytes of a cluster that can be changed in place, because it is stored whole
    /// and plain and used only once; nil for any other entry.
    private mutating func ownCluster(_ entry: ArraySlice<UInt64>) async throws -> Int64? {
        guard let word = entry.first, !geometry.hasExtendedL2,
            word & (Qcow2Entry.compressed | Qcow2Entry.zero) == 0
        else { return nil }
        let host = Int64(word & Qcow2Entry.offsetMask)
        // In a data file each cluster has its place.
        if data != nil { return word & Qcow2Entry.copied == 0 ? nil : host }
        guard host != 0, try await refcounts.count(of: host / geometry.clusterSize) == 1
        else { return nil }
        return host
    }

    // MARK: New tables

    /// Allocates a new L1 table if it gets longer or any entry changes. This comes before
    /// everything else: behind the new clusters, the table would keep the file from getting shorter
    /// again.
    private mutating func placeL1(_ growth: inout Growth) async throws {
        var isChanged = growth.geometry.l1Entries > header.l1Entries
        for table in tables(growth) where !isChanged {
            isChanged = try await needsWriting(table, growth)
        }
        guard isChanged else { return }
        let entries = max(header.l1Entries, growth.geometry.l1Entries)
        try MemoryMargin.check(for: Int(entries) * 8)
        image.l1.appendZeros(upTo: Int(entries))
        let count = (entries * 8).dividedUp(by: geometry.clusterSize)
        growth.change.l1Offset = HostOffset(
            try await refcounts.allocate(count) * geometry.clusterSize)
    }

    /// Indices of the L2 tables of the new clusters, and of the last old cluster if it changes.
    private func tables(_ growth: Growth) -> ClosedRange<Int64> {
        let first = growth.tail?.guestCluster ?? growth.new.lowerBound
        let last = max(first, growth.new.upperBound - 1)
        return first / geometry.l2Entries...last / geometry.l2Entries
    }

    private func newClusters(_ growth: Growth, in table: Int64) -> Range<Int64> {
        growth.new.clamped(to: table * geometry.l2Entries..<(table + 1) * geometry.l2Entries)
    }

    private func place(of cluster: Int64) -> Int {
        Int(cluster % geometry.l2Entries * geometry.wordsPerL2Entry)
    }

    /// Whether a table has to be written: for new entries, or because old entries behind the end of
    /// the disk have never been cleared.
    private func needsWriting(_ table: Int64, _ growth: Growth) async throws -> Bool {
        let new = newClusters(growth, in: table)
        if let tail = growth.tail, tail.host == nil,
            tail.guestCluster / geometry.l2Entries == table
        {
            return true
        }
        guard !new.isEmpty else { return false }
        if growth.preallocation != .off || new.lowerBound < growth.hiddenEnd { return true }
        guard try image.tableOffset(table) != nil else { return false }
        let start = place(of: new.lowerBound)
        let end = start + new.count * Int(geometry.wordsPerL2Entry)
        return try await image.readTable(table)[start..<end].contains { $0 != 0 }
    }

    /// Writes the L2 tables that change, all to new places, and the clusters that they preallocate.
    private mutating func writeTables(_ growth: inout Growth) async throws {
        for table in tables(growth) where try await needsWriting(table, growth) {
            try Task.checkCancellation()
            try await writeTable(table, &growth)
        }
    }

    private mutating func writeTable(_ index: Int64, _ growth: inout Growth) async throws {
        let old = try image.tableOffset(index)
        var words = try await image.readTable(index)
        let changed = newClusters(growth, in: index)
        let hasPlaces = growth.preallocation != .off
        let added = hasPlaces && data == nil ? Int64(changed.count) : 0
        let first = try await refcounts.allocate(1 + added)
        for (number, cluster) in zip((first + 1)..., changed) {
            let word = place(of: cluster)
            growth.change.freed += image.clusters(
                of: words[word..<word + Int(geometry.wordsPerL2Entry)])
            let isHidden = cluster < growth.hiddenEnd
            let hostCluster = data == nil ? number : cluster
            let host =
                hasPlaces ? UInt64(hostCluster * geometry.clusterSize) | Qcow2Entry.copied : 0
            if geometry.hasExtendedL2 {
                words[word] = host
                words[word + 1] =
                    isHidden
                    ? Qcow2Entry.allSubclustersZero
                    : header.isDataFileRaw ? Qcow2Entry.allSubclustersAllocated : 0
            } else {
                // Version 2 has no zero flag. There, hidden clusters are always preallocated and
                // read as zeros themselves.
                let flag = isHidden && header.version >= 3 ? Qcow2Entry.zero : 0
                words[word] = host | flag
            }
        }
        if let tail = growth.tail, tail.host == nil,
            tail.guestCluster / geometry.l2Entries == index
        {
            try await moveTail(tail, &words, &growth.change)
        }
        if added > 0 {
            let start = (first + 1) * geometry.clusterSize
            try await fill(start..<start + added * geometry.clusterSize, growth.preallocation)
        }
        try await storage.writeWords(words, at: first * geometry.clusterSize)
        image.l1[Int(index)] = UInt64(first * geometry.clusterSize) | Qcow2Entry.copied
        if let old { growth.change.freed.append(old.bytes / geometry.clusterSize) }
    }

    private mutating func moveTail(
        _ tail: Tail, _ words: inout [UInt64], _ change: inout Change
    ) async throws {
        let word = place(of: tail.guestCluster)
        change.freed += image.clusters(of: words[word..<word + Int(geometry.wordsPerL2Entry)])
        let hostCluster = data == nil ? try await refcounts.allocate(1) : tail.guestCluster
        let host = hostCluster * geometry.clusterSize
        // In a data file this changes only what the guest does not see yet.
        try await write(stored(tail, at: host)[...], at: host)
        words[word] = UInt64(host) | Qcow2Entry.copied
        if geometry.hasExtendedL2 { words[word + 1] = Qcow2Entry.allSubclustersAllocated }
    }

    /// Makes the data file as long as the new disk. Clusters that get a place there read as zeros,
    /// whatever the file holds behind the end of the old disk.
    private func growData(_ growth: Growth) async throws {
        guard let data else { return }
        let (old, new) = (geometry.virtualSize, growth.geometry.virtualSize)
        let length = data.size
        try await data.truncate(to: max(length, new))
        guard growth.preallocation != .off else { return }
        if length > old { try await data.zero(old..<min(length, new), mayUnmap: true) }
        switch growth.preallocation {
        case .off, .metadata: break
        case .falloc: try data.allocate(old..<new, .falloc)
        case .full: try await data.writeZeros(old..<new)
        }
    }

    /// Makes a new range of the file read as zeros, and allocates its blocks if the mode asks for
    /// it.
    private func fill(_ range: Range<Int64>, _ preallocation: Preallocation) async throws {
        if storage.traits.isDevice { return try await storage.zero(range, mayUnmap: true) }
        switch preallocation {
        case .off, .metadata: break
        case .falloc: try storage.allocate(range, .falloc)
        case .full: try await storage.writeZeros(range)
        }
    }
}
