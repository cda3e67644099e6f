/// How a server is used.
public struct NBDOptions: Sendable, Equatable {
    /// Connections to one export at most, if the server allows more than one; nil is 4, and no more than there
    /// are cores if the server is on this machine. They are made when the others are busy.
    public var connections: Int?
    /// Requests in flight on each of them at most; nil begins with 2 if the server is on this machine and shares
    /// our caches, with 8 otherwise, and has up to 64 where the server takes its time.
    public var requests: Int?
    /// How much one of them reads or writes, in bytes, as far as the server's block sizes allow; nil is 512 KiB if the
    /// server is on this machine, and 256 KiB otherwise.
    public var requestSize: Int64?
    /// Every write is on stable storage when it counts as done (the cache modes that say so).
    public var writesThrough = false
    /// The time that a lost connection may take to be made anew, in seconds; nil makes it an error
    /// at once.
    ///
    /// Writes that a server acknowledged and had not yet put away are gone with it. So every change
    /// of an export that is written to then waits until it is on stable storage, and a source has
    /// to be the same when it comes back: that cannot be checked.
    public var reconnectTime: Int?
    /// How long a server may leave requests unanswered, in seconds; nil waits for ever.
    public var timeout: Int?
    /// Use several connections although the server does not promise that they see each other's writes.
    ///
    /// A conversion does not need that promise: each range is written once, no two overlap, nothing is read
    /// back, and at the end, when all writes are answered, every connection is flushed.
    public var forcesMultiConn = false

    public static let connectionRange = 1...16
    public static let requestRange = 1...64
    /// In bytes.
    public static let requestSizeRange: ClosedRange<Int64> = 4096...32 << 20
    /// In seconds.
    public static let timeoutRange = 1...86400
    /// In seconds.
    public static let reconnectRange = 0...86400

    public init() {}

    /// A server on this machine shares its cores with us: more connections take turns on them.
    func connections(isServerLocal: Bool) -> Int {
        connections ?? min(4, isServerLocal ? NBDLoop.count : .max)
    }

    /// Requests that may be in flight on a connection: who asks keeps them fewer where they need
    /// not wait.
    var mostRequests: Int { requests ?? Self.requestRange.upperBound }

    /// Requests on a connection that keep a server busy which answers at once.
    func requests(isServerLocal: Bool) -> Int { requests ?? (isServerLocal ? 2 : 8) }

    /// In bytes.
    func requestSize(isServerLocal: Bool) -> Int64 {
        requestSize ?? (isServerLocal ? 512 << 10 : 256 << 10)
    }
}
