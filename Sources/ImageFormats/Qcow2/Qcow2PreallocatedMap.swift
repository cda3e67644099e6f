import DiskImage

/// The places of the clusters of a wholly preallocated image. Pure arithmetic: `Qcow2Layout` hands
/// out host clusters in sequence, so the place of each follows from its number, and data can be
/// written in any order.
struct Qcow2PreallocatedMap: Sendable {
    let geometry: Qcow2Geometry
    /// Number of clusters that one refcount block counts.
    let clustersPerBlock: Int64

    /// The host range of the first guest clusters of a range, as many as follow each other in the
    /// file.
    ///
    /// - Parameter guest: range in bytes that begins at a cluster.
    func run(from guest: Range<Int64>) -> Range<Int64> {
        let clusterSize = geometry.clusterSize
        let first = guest.lowerBound / clusterSize
        let end = guest.upperBound.dividedUp(by: clusterSize)
        // An L2 table precedes the data that it maps, and a refcount block the clusters that it
        // counts: a run ends before either.
        let tableEnd = (first / geometry.l2Entries + 1) * geometry.l2Entries
        let host = hostCluster(first)
        let blockEnd = host.roundedDown(to: clustersPerBlock) + clustersPerBlock
        let count = min(end, tableEnd) - first
        return host * clusterSize..<min(host + count, blockEnd) * clusterSize
    }

    /// Returns the writes of pieces, whose clusters have their places already.
    func place(_ pieces: [EncodedPiece]) -> Placement {
        var placement = Placement()
        for piece in pieces {
            var guest = piece.guestRange.lowerBound
            while guest < piece.guestRange.upperBound {
                let run = run(from: guest..<piece.guestRange.upperBound)
                switch piece.form {
                case .zero: placement.append(.zeros(Int64(run.count)), at: run.lowerBound)
                case .plain(let positions):
                    let start = positions.lowerBound + Int(guest - piece.guestRange.lowerBound)
                    placement.append(.plain(start..<start + run.count), at: run.lowerBound)
                case .compressed:
                    preconditionFailure("a preallocated image holds no compressed clusters")
                }
                guest += Int64(run.count)
            }
        }
        return placement
    }

    private func hostCluster(_ guestCluster: Int64) -> Int64 {
        let table = guestCluster / geometry.l2Entries
        let inTable = guestCluster % geometry.l2Entries
        // Tables and data take all clusters in sequence except the refcount block at the start of
        // each block's range, and in the first range the header before it.
        let number = table * (geometry.l2Entries + 1) + 1 + inTable
        let inFirstRange = clustersPerBlock - 2
        guard number >= inFirstRange else { return number + 2 }
        let (range, place) = (number - inFirstRange).quotientAndRemainder(
            dividingBy: clustersPerBlock - 1)
        return clustersPerBlock * (1 + range) + 1 + place
    }
}

// Writing a preallocated image: the tables come first, so that data can follow in any order.
extension Qcow2Target {
    /// Writes all tables, one L2 table after the other, and allocates blocks if the options want
    /// them.
    ///
    /// - Parameter fillsWithZeros: whether zeros are written to all data clusters, too.
    func preallocate(
        _ map: Qcow2PreallocatedMap, fillsWithZeros: Bool
    ) async throws -> Qcow2Layout.Ending {
        let geometry = map.geometry
        if options.preallocation.takesBlocks {
            try (data ?? storage).requireSpace(geometry.virtualSize)
        }
        var layout = Qcow2Layout(
            geometry, refcountBits: options.refcountBits, hasDataFile: data != nil)
        for table in 0..<geometry.l1Entries {
            try Task.checkCancellation()
            try MemoryMargin.check(for: 4 * Int(geometry.clusterSize))
            let placement = layout.preallocate(table: table, subclusters: preallocatedSubclusters)
            try await storage.writePlacement(placement, data: RawSpan())
        }
        let ending = try layout.finish(l1Entries: geometry.l1Entries, options.encryption)
        try await storage.writePlacement(ending.placement, data: RawSpan())
        try await storage.truncate(to: ending.end.bytes)
        if let data {
            try await preallocate(data, fillsWithZeros: fillsWithZeros)
            return ending
        }
        if options.preallocation.takesBlocks {
            try storage.requireSpace(geometry.virtualSize)
            try storage.allocate(0..<ending.end.bytes, options.preallocation)
        }
        if fillsWithZeros { try await fillWithZeros(map) }
        return ending
    }

    /// Bitmap of each extended entry. As in qemu, a new cluster shows the backing file, or zeros,
    /// until it is written. A conversion writes whole clusters of data, so its clusters are
    /// allocated; so are those of a raw data file, which shows what it holds.
    private var preallocatedSubclusters: UInt64 {
        writesData || options.isDataFileRaw ? Qcow2Entry.allSubclustersAllocated : 0
    }

    private func fillWithZeros(_ map: Qcow2PreallocatedMap) async throws {
        var guest: Int64 = 0
        let size = map.geometry.virtualSize
        while guest < size {
            try Task.checkCancellation()
            let run = map.run(from: guest..<size)
            if options.preallocation == .full {
                try await storage.writeZeros(run)
            } else {
                try await storage.zero(run, mayUnmap: true)
            }
            guest += Int64(run.count)
        }
    }
}
