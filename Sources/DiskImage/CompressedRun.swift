/// Compressed clusters one after the other, as they will lie in the file: one long write, mostly of
/// whole pages, instead of many short ones.
///
/// The placing task fills a run. It is written when it is full or the next cluster lies elsewhere,
/// and is then filled anew.
public final class CompressedRun: @unchecked Sendable {
    /// Offset of the run in bytes from the start of the storage.
    public private(set) var hostOffset: Int64 = 0
    public private(set) var count = 0
    private var limit = 0
    // One task at a time has a run: the placing one until the hand-over, then the writing one.
    private var memory: IOBuffer

    /// - Parameter capacity: length of the buffer in bytes.
    public init(capacity: Int) throws(ImageError) { memory = try IOBuffer(byteCount: capacity) }

    /// Length of the buffer in bytes.
    public var capacity: Int { memory.byteCount }

    /// Offset in bytes of the bytes that come next.
    public var end: Int64 { hostOffset + Int64(count) }

    public var isFull: Bool { count == limit }

    public var bytes: RawSpan {
        @_lifetime(borrow self)
        get {
            let span = memory.bytes.extracting(0..<count)
            return _overrideLifetime(span, borrowing: self)
        }
    }

    /// Empties the run, for bytes from `hostOffset` on. It is full at a multiple of its capacity,
    /// so that the next run begins at such a multiple.
    public func begin(at hostOffset: Int64) {
        self.hostOffset = hostOffset
        count = 0
        limit = capacity - Int(hostOffset % Int64(capacity))
    }

    /// - Returns: number of bytes taken, from the first on.
    public func append(_ bytes: RawSpan) -> Int {
        let taken = min(bytes.byteCount, limit - count)
        var room = memory.mutableBytes
        var place = room.slice(count..<count + taken)
        bytes.extracting(0..<taken).withUnsafeBytes { source in
            place.withUnsafeMutableBytes { $0.copyMemory(from: source) }
        }
        count += taken
        return taken
    }

    /// Adds zeros up to a multiple of `unit` bytes, as far as there is room.
    public func pad(to unit: Int) {
        let padded = min(Int(end.roundedUp(to: Int64(unit)) - hostOffset), limit)
        var room = memory.mutableBytes
        room.zeroFill(count..<padded)
        count = padded
    }

    /// A copy of the run in memory that is no longer than its bytes.
    public func trimmed() throws(ImageError) -> CompressedRun {
        let copy = try CompressedRun(capacity: count)
        copy.hostOffset = hostOffset
        copy.limit = count
        _ = copy.append(bytes)
        return copy
    }
}

extension CompressedRun: Equatable {
    public static func == (left: CompressedRun, right: CompressedRun) -> Bool { left === right }
}
