import DiskImage
import ImageStorage

// Images whose data lies in a file of its own, each cluster at its guest offset.
extension Qcow2Target {
    /// Makes the data file as long as the disk, and allocates blocks if the options want them.
    func preallocate(_ data: any WritableStorage, fillsWithZeros: Bool) async throws {
        let disk = 0..<geometry.virtualSize
        try await data.truncate(to: disk.upperBound)
        if options.preallocation.takesBlocks {
            try data.requireSpace(disk.upperBound)
            try data.allocate(disk, options.preallocation)
        }
        guard fillsWithZeros else { return }
        if options.preallocation == .full {
            try await data.writeZeros(disk)
        } else {
            for start in stride(from: 0, to: disk.upperBound, by: 1 << 30) {
                try Task.checkCancellation()
                try await data.zero(
                    (start..<start + 1 << 30).clamped(to: disk), mayUnmap: true)
            }
        }
    }

    /// Writes clusters to the data file and tables to the image.
    func write(
        _ placement: Placement, data: RawSpan, origin: BufferOrigin,
        dataFile: any WritableStorage
    ) async throws {
        var tables = Placement()
        var clusters = Placement()
        for write in placement.writes {
            guard case .plain(let positions) = write.bytes else {
                tables.append(write.bytes, at: write.hostOffset)
                continue
            }
            // The last cluster can reach beyond the disk, and a device may end with the disk. 0 is
            // the size of a disk that tells its size at its end.
            let room =
                geometry.virtualSize == 0
                ? positions.count : Int(geometry.virtualSize - write.hostOffset)
            clusters.append(.plain(positions.prefix(room)), at: write.hostOffset)
        }
        try await dataFile.writePlacement(clusters, data: data, origin: origin)
        try await storage.writePlacement(tables, data: RawSpan())
    }
}

/// An image with a data file in which every cluster has its place from the start. Its tables are
/// written first, and then data like that of a raw disk.
struct Qcow2DataFileTarget: ImageTarget {
    let tables: Qcow2Target
    let data: RawTarget

    var traits: TargetTraits { data.traits }
    var compresses: Bool { false }
    var sharesUnread: Bool { data.sharesUnread }

    func encode(
        _ data: RawSpan, positions: Range<Int>, at guestOffset: Int64,
        into encoded: inout MutableRawSpan, used: inout Int
    ) -> [EncodedPiece] {
        self.data.encode(data, positions: positions, at: guestOffset, into: &encoded, used: &used)
    }

    func place(_ pieces: [EncodedPiece], encoded: RawSpan) -> Placement {
        data.place(pieces, encoded: encoded)
    }

    func write(_ placement: Placement, data: RawSpan, origin: BufferOrigin) async throws {
        try await self.data.write(placement, data: data, origin: origin)
    }

    func share(
        _ range: Range<Int64>, of holder: any BlockHolder, at guestOffset: Int64
    ) -> Int64 {
        data.share(range, of: holder, at: guestOffset)
    }

    func finish(virtualSize: Int64) async throws {
        try await tables.finish(virtualSize: virtualSize)
    }
}
