/// What a conversion has to know about a target before it writes to it.
public struct TargetTraits: Sendable, Equatable {
    /// The unit of allocation in bytes, a power of two: chunks are cut at its multiples.
    public var granularity: Int64
    /// Guest bytes at or behind this offset read as zeros if nobody writes them; `Int64.max` if none
    /// do (a device, an existing image), 0 for a fresh file, the size of the backing file for an overlay.
    public var readsAsZeroFrom: Int64
    /// Unwritten parts show a backing file.
    public var hasBacking: Bool
    /// Zeros can be recorded without storing them.
    public var canWriteZeroes: Bool
    /// Host offsets are handed out in guest order. False where a guest offset is a host offset.
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
        /// Zeros, not stored.
        case zero
        /// Bytes as they are, at these positions of the chunk's data buffer.
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

/// What has to be written, and where: the answer of `ImageTarget.place`.
public struct Placement: Sendable {
    public enum Bytes: Sendable, Equatable {
        /// At these positions of the chunk's data buffer.
        case plain(Range<Int>)
        /// Of this chunk and of others before it.
        case compressed(CompressedRun)
        /// Tables that are complete.
        case metadata([UInt8])
        /// This many bytes of zeros.
        case zeros(Int64)
    }

    public struct Write: Sendable, Equatable {
        /// In bytes from the start of the target's storage.
        public var hostOffset: Int64
        public var bytes: Bytes

        public init(hostOffset: Int64, bytes: Bytes) {
            self.hostOffset = hostOffset
            self.bytes = bytes
        }
    }

    public var writes: [Write] = []

    public init() {}

    /// Whether the chunk's data buffer is needed to carry it out.
    public var usesData: Bool {
        writes.contains { if case .plain = $0.bytes { true } else { false } }
    }

    /// Adds a write, joined to the last one where both are neighbours in the buffer and in the host.
    public mutating func append(_ bytes: Bytes, at hostOffset: Int64) {
        if let last = writes.last, let joined = Self.join(last, bytes, at: hostOffset) {
            writes[writes.count - 1] = joined
        } else {
            writes.append(Write(hostOffset: hostOffset, bytes: bytes))
        }
    }

    private static func join(_ last: Write, _ bytes: Bytes, at hostOffset: Int64) -> Write? {
        switch (last.bytes, bytes) {
        case (.plain(let before), .plain(let next))
        where before.upperBound == next.lowerBound
            && last.hostOffset + Int64(before.count) == hostOffset:
            Write(
                hostOffset: last.hostOffset, bytes: .plain(before.lowerBound..<next.upperBound))
        default: nil
        }
    }
}

/// A guest disk being written, once, front to back.
///
/// For each chunk `encode` runs on any worker, `place` in guest order (in any order where
/// `traits.placesInOrder` is false), `write` on any worker again, and `finish` once after them all.
public protocol ImageTarget: Sendable {
    var traits: TargetTraits { get }

    /// Turns guest bytes into the form they are stored in: finds zeros, compresses. Pure CPU work.
    ///
    /// - Parameters:
    ///   - data: the chunk's data buffer.
    ///   - positions: where in `data` the bytes of this call lie.
    ///   - guestOffset: what the first of them is on the guest disk, a multiple of the granularity.
    ///   - encoded: a buffer for compressed clusters, as long as `data`; what lies before `used` is taken.
    ///   - used: how much of `encoded` is taken; moved on.
    func encode(
        _ data: RawSpan, positions: Range<Int>, at guestOffset: Int64,
        into encoded: inout MutableRawSpan, used: inout Int
    ) throws -> [EncodedPiece]

    /// Whether `encode` needs its `encoded` buffer.
    var compresses: Bool { get }

    /// Decides where the pieces go, and takes compressed clusters along: many make one write. Bookkeeping
    /// in memory: no I/O, no waiting.
    ///
    /// - Parameter encoded: the buffer that `encode` filled.
    func place(_ pieces: [EncodedPiece], encoded: RawSpan) throws -> Placement

    /// Writes what `place` decided, plain clusters out of the chunk's data buffer. Each placement once: it can hold
    /// bytes of chunks before this one.
    ///
    /// - Parameter origin: of that buffer.
    func write(_ placement: Placement, data: RawSpan, origin: BufferOrigin) async throws

    /// Whether data may be taken over by `share` without looking for zeros in it. It may become false on
    /// the way, when the storage turns out not to share.
    var sharesUnread: Bool { get }

    /// Takes over the blocks in which a source holds what belongs at `guestOffset`.
    ///
    /// - Returns: how many of its bytes, from the first on; the others have to be copied.
    func share(_ location: HostLocation, at guestOffset: Int64) -> Int64

    /// Writes what makes the image whole: tables, refcounts, the header last.
    func finish() async throws
}

extension ImageTarget {
    public var sharesUnread: Bool { false }

    public func share(_ location: HostLocation, at guestOffset: Int64) -> Int64 { 0 }
}
