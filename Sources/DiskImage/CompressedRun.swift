/// Compressed clusters one behind the other, as they will lie in the file: one long write instead of many short ones,
/// and mostly one of whole pages.
///
/// Filled by whoever places them, written once it is full or what follows lies elsewhere, and filled anew.
public final class CompressedRun: @unchecked Sendable {
    /// Where it goes, in bytes from the start of the storage.
    public private(set) var hostOffset: Int64 = 0
    public private(set) var count = 0
    private var limit = 0
    // Only one task at a time has a run: the placing one until it is handed out, the writing one from then on.
    private var memory: IOBuffer

    /// - Parameter capacity: in bytes.
    public init(capacity: Int) throws(ImageError) { memory = try IOBuffer(byteCount: capacity) }

    /// In bytes.
    public var capacity: Int { memory.byteCount }

    /// Where the bytes that come next belong.
    public var end: Int64 { hostOffset + Int64(count) }

    public var isFull: Bool { count == limit }

    public var bytes: RawSpan {
        @_lifetime(borrow self)
        get {
            let span = memory.bytes.extracting(0..<count)
            return _overrideLifetime(span, borrowing: self)
        }
    }

    /// Empties it, for what lies from `hostOffset` on. It is full at a multiple of its capacity, so that the one that
    /// follows it begins at one.
    public func begin(at hostOffset: Int64) {
        self.hostOffset = hostOffset
        count = 0
        limit = capacity - Int(hostOffset % Int64(capacity))
    }

    /// - Returns: how many of the bytes it took, from the first on.
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

    /// Adds zeros up to a multiple of `unit`, as far as there is room for them.
    public func pad(to unit: Int) {
        let padded = min(Int(end.roundedUp(to: Int64(unit)) - hostOffset), limit)
        var room = memory.mutableBytes
        room.zeroFill(count..<padded)
        count = padded
    }

    /// The same bytes in memory that is no longer than they are.
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
