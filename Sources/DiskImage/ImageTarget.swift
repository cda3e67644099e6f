/// The properties of a target that a conversion has to know before it writes.
public struct TargetTraits: Sendable, Equatable {
    /// The unit of allocation in bytes, a power of two: chunks are cut at its multiples.
    public var granularity: Int64
    /// Guest offset in bytes from which on unwritten bytes read as zeros; `Int64.max` if none do (a
    /// device, an existing image), 0 for a fresh file, the size of the backing file for an overlay.
    public var readsAsZeroFrom: Int64
    /// Whether unwritten parts show a backing file.
    public var hasBacking: Bool
    /// Whether zeros can be recorded without storing them.
    public var canWriteZeroes: Bool
    /// Whether host offsets are handed out in guest order; false if they equal guest offsets.
    public var placesInOrder: Bool

    public init(
        granularity: Int64, readsAsZeroFrom: Int64, hasBacking: Bool = false,
        canWriteZeroes: Bool = true, placesInOrder: Bool
    ) {
        self.granularity = granularity
        self.readsAsZeroFrom = readsAsZeroFrom
        self.hasBacking = hasBacking
        self.canWriteZeroes = canWriteZeroes
        self.placesInOrder = placesInOrder
    }
}

/// A piece of guest disk in the form in which it will be stored.
public struct EncodedPiece: Sendable, Equatable {
    public enum Form: Sendable, Equatable {
        /// Zeros, which are not stored.
        case zero
        /// Unchanged bytes, at these positions of the chunk's data buffer.
        case plain(Range<Int>)
        /// One compressed cluster, at these positions of the chunk's encoded buffer.
        case compressed(Range<Int>)
    }

    /// Guest offsets in bytes, cut at the target's granularity.
    public var guestRange: Range<Int64>
    public var form: Form

    public init(guestRange: Range<Int64>, form: Form) {
        self.guestRange = guestRange
        self.form = form
    }
}

/// The writes that `ImageTarget.place` decides on.
public struct Placement: Sendable {
    public enum Bytes: Sendable, Equatable {
        /// Bytes at these positions of the chunk's data buffer.
        case plain(Range<Int>)
        /// Compressed clusters of this chunk and of earlier ones.
        case compressed(CompressedRun)
        /// Complete tables.
        case metadata([UInt8])
        /// This many bytes of zeros.
        case zeros(Int64)
    }

    public struct Write: Sendable, Equatable {
        /// Bytes from the start of the target's storage.
        public var hostOffset: Int64
        public var bytes: Bytes
    }

    public var writes: [Write] = []

    public init() {}

    /// Whether the writes need the chunk's data buffer.
    public var usesData: Bool {
        writes.contains { if case .plain = $0.bytes { true } else { false } }
    }

    /// Adds a write. Plain bytes are joined to the last write if they are neighbours in the buffer
    /// and in the host, zeros if they are in the host.
    public mutating func append(_ bytes: Bytes, at hostOffset: Int64) {
        if let last = writes.last, case .plain(let before) = last.bytes,
            case .plain(let next) = bytes, before.upperBound == next.lowerBound,
            last.hostOffset + Int64(before.count) == hostOffset
        {
            writes[writes.count - 1].bytes = .plain(before.lowerBound..<next.upperBound)
        } else if let last = writes.last, case .zeros(let before) = last.bytes,
            case .zeros(let next) = bytes, last.hostOffset + before == hostOffset
        {
            writes[writes.count - 1].bytes = .zeros(before + next)
        } else {
            writes.append(Write(hostOffset: hostOffset, bytes: bytes))
        }
    }
}

/// A guest disk that is written once, front to back.
///
/// For each chunk `encode` runs on any worker, `place` in guest order (in any order if
/// `traits.placesInOrder` is false), `write` on any worker. `finish` runs once at the end.
public protocol ImageTarget: Sendable {
    var traits: TargetTraits { get }

    /// Encodes guest bytes for storage: finds zeros, compresses. Pure CPU work.
    ///
    /// - Parameters:
    ///   - data: the chunk's data buffer.
    ///   - positions: byte positions in `data` that this call encodes.
    ///   - guestOffset: guest offset in bytes of the first position, a multiple of the granularity.
    ///   - encoded: a buffer for compressed clusters, as long as `data`; bytes before `used` are
    ///     taken.
    ///   - used: number of bytes taken in `encoded`; increased by this call.
    func encode(
        _ data: RawSpan, positions: Range<Int>, at guestOffset: Int64,
        into encoded: inout MutableRawSpan, used: inout Int
    ) throws -> [EncodedPiece]

    /// Whether `encode` needs its `encoded` buffer.
    var compresses: Bool { get }

    /// Decides where the pieces go, and collects compressed clusters so that many make one write.
    /// Bookkeeping in memory for a new image; an image that is written in place may have to read
    /// its tables.
    ///
    /// - Parameter encoded: the buffer that `encode` filled.
    func place(_ pieces: [EncodedPiece], encoded: RawSpan) async throws -> Placement

    /// Encrypts, if the target does, what `place` decided to write of the chunk's data buffer. CPU
    /// work, on any worker.
    func seal(_ placement: Placement, data: inout MutableRawSpan) throws

    /// Writes what `place` decided, with plain clusters from the chunk's data buffer. Each
    /// placement has to be written once, because it can hold bytes of earlier chunks.
    ///
    /// - Parameter origin: the origin of `data`.
    func write(_ placement: Placement, data: RawSpan, origin: BufferOrigin) async throws

    /// Whether `share` may take data over before zeros are looked for in it. This can become false
    /// during a conversion, when the storage turns out not to share.
    var sharesUnread: Bool { get }

    /// Shares the blocks in which a source holds the data for `guestOffset`.
    ///
    /// - Parameter range: of the holder, in bytes; never empty.
    /// - Returns: number of bytes shared, from the first on; the others have to be copied.
    func share(_ range: Range<Int64>, of holder: any BlockHolder, at guestOffset: Int64) -> Int64

    /// Brings to the storage what leads to the bytes written so far, if that cannot wait for the
    /// end. A flush of the storage makes it stable.
    func settle() async throws

    /// Writes what completes the image: tables, refcounts, the header last.
    ///
    /// - Parameter virtualSize: size of the guest disk in bytes. A target that was made for an
    ///   open-ended source learns it here.
    func finish(virtualSize: Int64) async throws
}

extension ImageTarget {
    public var sharesUnread: Bool { false }

    public func seal(_ placement: Placement, data: inout MutableRawSpan) {}

    public func settle() {}

    public func share(
        _ range: Range<Int64>, of holder: any BlockHolder, at guestOffset: Int64
    ) -> Int64 { 0 }
}

/// A target that has to know what comes before the first byte of it, because it is written from
/// front to back.
public protocol PlannedTarget: ImageTarget {
    /// Called once, before `encode`.
    func begin(_ plan: DiskPlan) async throws
}

/// Where a disk will have data and zeros in a target.
public struct DiskPlan: Sendable, Equatable {
    public struct Range: Sendable, Equatable {
        /// Guest offsets in bytes, whole units of the target.
        public var guest: Swift.Range<Int64>
        /// Whether data is stored; false for zeros that have to be recorded.
        public var isStored: Bool

        public init(guest: Swift.Range<Int64>, isStored: Bool) {
            self.guest = guest
            self.isStored = isStored
        }
    }

    /// In guest order; all that lies between them is left out.
    public private(set) var ranges: [Range] = []

    public init() {}

    /// Adds a range behind all others, joined to the last one if they are neighbours.
    public mutating func append(_ range: Range) {
        if let last = ranges.last, last.guest.upperBound == range.guest.lowerBound,
            last.isStored == range.isStored
        {
            ranges[ranges.count - 1].guest = last.guest.lowerBound..<range.guest.upperBound
        } else {
            ranges.append(range)
        }
    }
}
