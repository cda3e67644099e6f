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
}

extension Placement {
    /// The writes of pieces to a data file, in which every cluster has its place.
    init(inDataFile pieces: [EncodedPiece]) {
        self.init()
        for piece in pieces {
            switch piece.form {
            case .zero:
                append(.zeros(Int64(piece.guestRange.count)), at: piece.guestRange.lowerBound)
            case .plain(let positions):
                append(.plain(positions), at: piece.guestRange.lowerBound)
            case .compressed: preconditionFailure("a data file holds no compressed clusters")
            }
        }
    }

    /// Divides the writes into those to the data file and those of tables.
    ///
    /// - Parameter end: the size of the disk in bytes. The last cluster can reach beyond it, and a
    ///   device may end with the disk. 0 is the size of a disk that tells its size at its end.
    func divided(endOfData end: Int64) -> (data: Placement, tables: Placement) {
        var data = Placement()
        var tables = Placement()
        for write in writes {
            let room = end == 0 ? Int64.max : end - write.hostOffset
            switch write.bytes {
            case .plain(let positions):
                data.append(
                    .plain(positions.prefix(Int(clamping: room))), at: write.hostOffset)
            case .zeros(let length):
                data.append(.zeros(min(length, room)), at: write.hostOffset)
            case .compressed, .metadata: tables.append(write.bytes, at: write.hostOffset)
            }
        }
        return (data, tables)
    }

    /// Replaces plain blocks of zeros, so that they take no space.
    ///
    /// - Parameters:
    ///   - data: the bytes of plain writes.
    ///   - minimum: length in bytes of the shortest run of zeros that is replaced.
    func sparse(_ data: RawSpan, minimum: Int) -> Placement {
        var placement = Placement()
        for write in writes {
            guard case .plain(let positions) = write.bytes else {
                placement.append(write.bytes, at: write.hostOffset)
                continue
            }
            ZeroScan.forEachRun(
                in: data, positions, unit: min(RawTarget.scanUnit, minimum), minimum: minimum
            ) { run, isZero in
                placement.append(
                    isZero ? .zeros(Int64(run.count)) : .plain(run),
                    at: write.hostOffset + Int64(run.lowerBound - positions.lowerBound))
            }
        }
        return placement
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
