import Foundation
import Glibc

/// An NBD server on a unix socket, ended with this object.
public final class NBDTestServer {
    public let socket: String
    public let process: RunningProcess
    private let folder: TempFolder

    public static let isInstalled = hasProgram("nbdkit") && hasProgram("qemu-nbd")

    /// `nbdkit -f -U socket` with these arguments.
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

    /// `qemu-nbd -t -k socket -e 16` with these arguments.
    public static func qemu(_ arguments: String...) throws -> NBDTestServer {
        try NBDTestServer("qemu-nbd", { ["-t", "-e", "16", "-k", $0] + arguments }, TempFolder())
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

    /// The export, as swimg and qemu-img name it.
    public var uri: String { "nbd+unix:///?socket=\(socket)" }

    /// Lets the server put away what it has, and end.
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
