import DiskImage
import ImageStorage

/// A raw image that is being written. Guest offsets equal host offsets, so pieces are placed in any
/// order.
public struct RawTarget: ImageTarget {
    /// Unit of the search for zeros in bytes, as in qemu-img: the block size of nearly every file
    /// system, so that omitted zeros take no space.
    static let scanUnit = 4096

    public let traits: TargetTraits
    public var compresses: Bool { false }
    private let storage: any WritableStorage
    private let minSparse: Int
    private let looksForZeros: Bool
    private let isThere: Bool

    /// - Parameters:
    ///   - minSparse: runs of zeros of at least this many bytes are left out; 0 writes everything.
    ///   - looksForZeros: whether zeros are searched for in data that could be shared unread, too.
    ///   - isThere: whether the storage keeps its size.
    ///   - leavesBacking: whether the content leaves out what the storage holds already.
    ///   - readsAsZero: whether unwritten parts of the storage read as zeros.
    public init(
        storage: any WritableStorage, minSparse: Int, looksForZeros: Bool = true,
        isThere: Bool = false, leavesBacking: Bool = false, readsAsZero: Bool
    ) {
        self.storage = storage
        self.minSparse = minSparse
        self.looksForZeros = looksForZeros
        self.isThere = isThere
        traits = TargetTraits(
            granularity: max(Int64(Self.scanUnit), storage.traits.blockSize),
            readsAsZeroFrom: readsAsZero ? 0 : .max, hasBacking: leavesBacking,
            placesInOrder: false)
    }

    public func encode(
        _ data: RawSpan, positions: Range<Int>, at guestOffset: Int64,
        into encoded: inout MutableRawSpan, used: inout Int
    ) -> [EncodedPiece] {
        func guestRange(_ run: Range<Int>) -> Range<Int64> {
            let start = guestOffset + Int64(run.lowerBound - positions.lowerBound)
            return start..<start + Int64(run.count)
        }
        guard minSparse > 0 else {
            return [EncodedPiece(guestRange: guestRange(positions), form: .plain(positions))]
        }
        var pieces: [EncodedPiece] = []
        ZeroScan.forEachRun(
            in: data, positions, unit: min(Self.scanUnit, minSparse), minimum: minSparse
        ) { run, isZero in
            pieces.append(
                EncodedPiece(guestRange: guestRange(run), form: isZero ? .zero : .plain(run)))
        }
        return pieces
    }

    public func place(_ pieces: [EncodedPiece], encoded: RawSpan) -> Placement {
        var placement = Placement()
        for piece in pieces {
            let offset = piece.guestRange.lowerBound
            switch piece.form {
            case .zero where offset >= traits.readsAsZeroFrom: break
            case .zero: placement.append(.zeros(Int64(piece.guestRange.count)), at: offset)
            case .plain(let positions): placement.append(.plain(positions), at: offset)
            case .compressed: preconditionFailure("a raw image holds no compressed clusters")
            }
        }
        return placement
    }

    public func write(
        _ placement: Placement, data: RawSpan, origin: BufferOrigin
    ) async throws {
        try await storage.writePlacement(placement, data: data, origin: origin)
    }

    public var sharesUnread: Bool { !looksForZeros && storage.sharesBlocks }

    public func share(
        _ range: Range<Int64>, of holder: any BlockHolder, at guestOffset: Int64
    ) -> Int64 {
        storage.share(range, of: holder, at: guestOffset)
    }

    public func finish(virtualSize: Int64) async throws {
        guard storage.size < virtualSize else { return }
        guard !isThere else {
            throw ImageError(
                .invalid, path: storage.name,
                "is smaller (\(storage.size) bytes) than the source (\(virtualSize) bytes)")
        }
        // Made for an open-ended source.
        try await storage.truncate(to: virtualSize)
    }
}
