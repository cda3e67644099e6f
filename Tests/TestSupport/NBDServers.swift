import Foundation
import Glibc

/// An NBD server on a unix socket; it ends when this object is released.
public final class NBDTestServer {
    public let socket: String
    public let process: RunningProcess
    private let folder: TempFolder

    public static let isInstalled = hasProgram("nbdkit") && hasProgram("qemu-nbd")

    /// Starts `nbdkit -f -U socket` with these arguments.
    public static func nbdkit(
        _ arguments: String..., folder: TempFolder? = nil
    ) throws -> NBDTestServer {
        try nbdkit(arguments, folder: folder)
    }

    public static func nbdkit(
        _ arguments: [String], folder: TempFolder? = nil
    ) throws -> NBDTestServer {
        try NBDTestServer("nbdkit", { ["-f", "-U", $0] + arguments }, folder ?? TempFolder())
    }

    /// Starts `qemu-nbd -t -k socket -e 16` with these arguments.
    public static func qemu(_ arguments: String...) throws -> NBDTestServer {
        try NBDTestServer("qemu-nbd", { ["-t", "-e", "16", "-k", $0] + arguments }, TempFolder())
    }

    /// Runs nbdkit on a local TCP port while `body` runs.
    public static func withPort(
        _ arguments: [String], _ body: (_ port: Int) throws -> Void
    ) throws {
        // Another process may take a free port before nbdkit does, hence several attempts.
        for _ in 0..<10 {
            let port = try freePort()
            let server = try RunningProcess(
                "nbdkit", ["-f", "-i", "localhost", "-p", "\(port)"] + arguments)
            defer {
                server.kill()
                _ = try? server.wait()
            }
            let isThere = server.wait(until: { !server.isRunning || canConnect(to: port) })
            guard isThere, server.isRunning else { continue }
            return try body(port)
        }
        throw CommandError(description: "no port for nbdkit")
    }

    private init(
        _ program: String, _ arguments: (String) -> [String], _ folder: TempFolder
    ) throws {
        self.folder = folder
        let socket = folder.path("socket")
        self.socket = socket
        unlink(socket)
        process = try RunningProcess(program, arguments(socket))
        guard process.wait(until: { access(socket, F_OK) == 0 }), process.isRunning else {
            throw CommandError(
                description: "\(process.command): "
                    + String(decoding: process.errors, as: UTF8.self))
        }
    }

    /// The URI of the export for swimg and qemu-img.
    public var uri: String { "nbd+unix:///?socket=\(socket)" }

    /// Lets the server flush its data and end.
    public func end() {
        process.send(SIGTERM)
        _ = try? process.wait()
    }

    /// Kills the server.
    public func stop() {
        process.kill()
        _ = try? process.wait()
    }

    deinit { stop() }
}

private func withLocalSocket<Result>(
    port: Int, _ body: (Int32, UnsafeMutablePointer<sockaddr>) -> Result
) -> Result {
    let descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
    defer { close(descriptor) }
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_port = in_port_t(port).bigEndian
    address.sin_addr.s_addr = inet_addr("127.0.0.1")
    return withUnsafeMutablePointer(to: &address) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { body(descriptor, $0) }
    }
}

private let addressSize = socklen_t(MemoryLayout<sockaddr_in>.size)

func freePort() throws -> Int {
    let port = withLocalSocket(port: 0) { descriptor, address -> Int? in
        var size = addressSize
        guard bind(descriptor, address, size) == 0, getsockname(descriptor, address, &size) == 0
        else { return nil }
        return address.withMemoryRebound(to: sockaddr_in.self, capacity: 1) {
            Int(in_port_t(bigEndian: $0.pointee.sin_port))
        }
    }
    guard let port else {
        throw CommandError(description: "no port: \(String(cString: strerror(errno)))")
    }
    return port
}

func canConnect(to port: Int) -> Bool {
    withLocalSocket(port: port) { connect($0, $1, addressSize) == 0 }
}
