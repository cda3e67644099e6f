import Foundation
import Glibc

/// A daemon of oVirt that serves one disk for one ticket. It ends when this object is released.
public final class ImageioDaemon {
    /// The program that `make setup-test` installs beside the build.
    private static let program = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
        .deletingLastPathComponent().deletingLastPathComponent()
        .appendingPathComponent(".build/imageio/bin/ovirt-imageio").path
    private static let ticket = "secret-ticket"

    public static let isInstalled = access(program, X_OK) == 0

    public let port: Int
    /// The daemon's unix socket.
    public let socket: String
    public let authority: String
    private let isSecure: Bool
    private let process: RunningProcess
    private let folder: TempFolder

    /// - Parameters:
    ///   - url: the disk, such as `file:///path` or `nbd:unix:/socket`.
    ///   - size: in bytes.
    ///   - isSecure: whether the daemon uses TLS.
    ///   - hasSocket: whether it listens on its unix socket.
    ///   - operations: what the ticket allows.
    ///   - timeout: time in seconds without a request after which the ticket expires.
    public init(
        _ url: String, size: Int, isSecure: Bool = false, hasSocket: Bool = false,
        operations: [String] = ["read", "write"], timeout: Int = 300
    ) throws {
        let folder = try TempFolder()
        self.folder = folder
        self.isSecure = isSecure
        socket = folder.path("socket")
        authority = folder.path("ca.pem")
        if isSecure {
            try require(
                "openssl",
                [
                    "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout",
                    folder.path("key.pem"), "-out", authority,
                ])
        }
        let settings = """
            [daemon]
            systemd_enable = false
            drop_privileges = false
            run_dir = \(folder.path)
            [tls]
            enable = \(isSecure)
            key_file = \(folder.path("key.pem"))
            cert_file = \(authority)
            ca_file = \(authority)
            [remote]
            host = 127.0.0.1
            port = 0
            [local]
            enable = \(hasSocket)
            socket = \(socket)
            [control]
            transport = unix
            socket = \(folder.path("control"))
            [handlers]
            keys = stderr
            [logger_root]
            level = DEBUG
            handlers = stderr
            """
        try FileManager.default.createDirectory(
            atPath: folder.path("conf.d"), withIntermediateDirectories: true)
        try Data(settings.utf8).write(to: URL(fileURLWithPath: folder.path("conf.d/a.conf")))
        let ticket: [String: Any] = [
            "uuid": Self.ticket, "size": size, "url": url, "timeout": timeout, "sparse": true,
            "ops": operations,
        ]
        try JSONSerialization.data(withJSONObject: ticket)
            .write(to: URL(fileURLWithPath: folder.path("ticket.json")))
        let process = try RunningProcess(
            Self.program, ["-c", folder.path, "-t", folder.path("ticket.json")])
        self.process = process
        var port: Int?
        _ = process.wait(until: {
            let log = String(decoding: process.errors, as: UTF8.self)
            guard log.contains("Ready for requests"),
                let line = log.split(separator: "\n").first(where: {
                    $0.contains("remote.service listening on")
                })
            else { return false }
            port = line.split { !$0.isNumber }.last.flatMap { Int($0) }
            return true
        })
        guard let port else {
            throw CommandError(description: String(decoding: process.errors, as: UTF8.self))
        }
        self.port = port
    }

    deinit { process.kill() }

    public var uri: String {
        "imageio\(isSecure ? "" : "+http")://localhost:\(port)/images/\(Self.ticket)"
    }

    public var socketURI: String { "imageio+unix:///images/\(Self.ticket)?socket=\(socket)" }

    /// Takes the ticket back, as a user does who cancels the transfer. Returns when the daemon does
    /// no more of it.
    public func cancel() throws {
        try require(Self.program + "ctl", ["del-ticket", "-c", folder.path, Self.ticket])
    }

    /// The lines of the daemon's log.
    public var log: [String] {
        String(decoding: process.errors, as: UTF8.self).split(separator: "\n").map(String.init)
    }
}
