/// The options for a server.
public struct NBDOptions: Sendable, Equatable {
    /// Largest number of connections to one export, if the server allows several; nil is 4, at most
    /// one for each core if the server is on this machine. They are added when the others are busy.
    public var connections: Int?
    /// Largest number of requests in flight on a connection. nil begins with 2 if the server is on
    /// this machine and shares our caches, with 8 otherwise, and has up to 64 if the server is
    /// slow.
    public var requests: Int?
    /// Length of a request in bytes, as far as the server's block sizes allow. nil is 512 KiB if
    /// the server is on this machine, and 256 KiB otherwise.
    public var requestSize: Int64?
    /// Whether a write is on stable storage when it counts as done (the cache modes that say so).
    public var writesThrough = false
    /// Time in seconds for a lost connection to be made anew; nil makes the loss an error at once.
    ///
    /// Writes that a server acknowledged and had not yet stored are lost with the connection. So
    /// every change of a target waits until it is on stable storage. A source must not change until
    /// the server comes back; that cannot be checked.
    public var reconnectTime: Int?
    /// Time in seconds that a server may leave requests unanswered; nil waits for ever.
    public var timeout: Int?
    /// Whether to use several connections even if the server does not promise that each sees the
    /// writes of the others.
    ///
    /// A conversion does not need that promise: each range is written once, no two overlap, nothing
    /// is read back, and at the end, when all writes are answered, every connection is flushed.
    public var forcesMultiConn = false

    public static let connectionRange = 1...16
    public static let requestRange = 1...64
    /// Allowed lengths in bytes.
    public static let requestSizeRange: ClosedRange<Int64> = 4096...32 << 20
    /// Allowed times in seconds.
    public static let timeoutRange = 1...86400
    /// Allowed times in seconds.
    public static let reconnectRange = 0...86400

    public init() {}

    /// Largest number of connections: more would take turns on the cores of a local server.
    func connections(isServerLocal: Bool) -> Int {
        connections ?? min(4, isServerLocal ? NBDLoop.count : .max)
    }

    /// Largest number of requests in flight on a connection. Callers send fewer if they need not
    /// wait.
    var mostRequests: Int { requests ?? Self.requestRange.upperBound }

    /// Number of requests on a connection that keep a server busy if it answers at once.
    func requests(isServerLocal: Bool) -> Int { requests ?? (isServerLocal ? 2 : 8) }

    /// Length of a request in bytes.
    func requestSize(isServerLocal: Bool) -> Int64 {
        requestSize ?? (isServerLocal ? 512 << 10 : 256 << 10)
    }
}
