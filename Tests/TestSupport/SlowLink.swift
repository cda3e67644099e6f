import Foundation
import Glibc

/// A unix socket proxy that forwards requests at once and answers in pieces with pauses.
public final class SlowLink: Sendable {
    public let socket: String
    private let listener: Int32
    private let folder: TempFolder

    /// - Parameters:
    ///   - piece: size in bytes.
    ///   - pause: time after each piece, in microseconds.
    public init(to server: String, piece: Int, pause: UInt32) throws {
        folder = try TempFolder()
        socket = folder.path("slow")
        let listener = Glibc.socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        self.listener = listener
        guard withAddress(socket, { bind(listener, $0, $1) }) == 0, listen(listener, 16) == 0
        else { throw CommandError(description: "no socket: \(String(cString: strerror(errno)))") }
        Thread.detachNewThread {
            while true {
                let client = accept(listener, nil, nil)
                guard client >= 0 else { return }
                let upstream = Glibc.socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
                _ = withAddress(server) { connect(upstream, $0, $1) }
                Thread.detachNewThread { forward(client, upstream, piece: 1 << 16, pause: 0) }
                Thread.detachNewThread { forward(upstream, client, piece: piece, pause: pause) }
            }
        }
    }

    public var uri: String { "nbd+unix:///?socket=\(socket)" }

    deinit {
        shutdown(listener, Int32(SHUT_RDWR))
        close(listener)
    }
}

func withAddress(
    _ path: String, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32
) -> Int32 {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
    return withUnsafePointer(to: address) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
            body($0, socklen_t(MemoryLayout<sockaddr_un>.size))
        }
    }
}

/// Copies one direction until either end closes; both sockets are then shut down, which also ends
/// the copy of the other direction.
private func forward(_ from: Int32, _ to: Int32, piece: Int, pause: UInt32) {
    var bytes = [UInt8](repeating: 0, count: piece)
    while true {
        let count = recv(from, &bytes, piece, 0)
        guard count > 0, send(to, bytes, count, Int32(MSG_NOSIGNAL)) == count else {
            break
        }
        if pause > 0 { usleep(pause) }
    }
    shutdown(from, Int32(SHUT_RDWR))
    shutdown(to, Int32(SHUT_RDWR))
}
