import DiskImage
import ImageStorage

/// The options for HTTP servers.
public struct HTTPOptions: Sendable, Equatable {
    /// Header lines that go with each request, such as `Authorization: Bearer …`.
    public var headers: [String] = []
    /// File of the certificates of authorities; nil trusts those of the system.
    public var authorities: HostPath?
    /// File of the client's certificate, and of its key, if that is another one.
    public var certificate: HostPath?
    public var key: HostPath?
    /// Whether any server's certificate is good enough.
    public var isInsecure = false
    /// Unix socket of the server or proxy, instead of the host in the address.
    public var socket: HostPath?
    /// Whether to use HTTP/2 if the server offers it.
    public var allowsHTTP2 = false
    /// Largest number of connections; nil leaves it to the driver.
    public var connections: Int?
    /// Time in seconds without a byte after which a request fails.
    public var timeout = Self.defaultTimeout
    /// Largest number of attempts in a row that bring nothing, after the first.
    public var retries = Self.defaultRetries

    public static let defaultTimeout = 30
    public static let defaultRetries = 6
    /// Allowed numbers.
    public static let timeoutRange = 1...86400
    public static let retryRange = 0...100

    public init() {}
}

extension StorageOptions {
    /// The options for HTTP servers.
    public var http: HTTPOptions {
        get { self[HTTPOptions.self] ?? HTTPOptions() }
        set { self[HTTPOptions.self] = newValue }
    }
}
