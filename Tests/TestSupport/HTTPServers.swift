import Foundation
import Glibc

/// A server of `Tests/Servers/odd_http.py`, which serves one file and misbehaves on purpose. It
/// ends when this object is released.
public final class OddServer {
    /// A request as the server saw it.
    public struct Request: Sendable {
        public var method: String
        public var path: String
        /// The bytes that were asked for, or sent to be stored; nil for the whole file.
        public var range: Range<Int>?
        public var status: Int
        /// Number of bytes of the body that were sent.
        public var sent: Int
    }

    public let port: Int
    private let process: RunningProcess
    private let folder: TempFolder

    public static let isInstalled = hasProgram("python3")

    /// - Parameter faults: words such as `busy=10`; the script explains them.
    public convenience init(_ file: String, _ faults: String...) throws {
        try self.init(file, faults)
    }

    public init(_ file: String, _ faults: [String]) throws {
        folder = try TempFolder()
        let script = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
            .deletingLastPathComponent().appendingPathComponent("Servers/odd_http.py").path
        let process = try RunningProcess(
            "python3", [script, file, folder.path("log")] + faults)
        self.process = process
        _ = process.wait(until: { !process.output.isEmpty })
        guard
            let port = Int(
                String(decoding: process.output, as: UTF8.self)
                    .trimmingCharacters(in: .whitespacesAndNewlines))
        else { throw CommandError(description: String(decoding: process.errors, as: UTF8.self)) }
        self.port = port
    }

    deinit { process.kill() }

    /// The address of the file.
    public var url: String { "http://127.0.0.1:\(port)/disk" }

    public func requests() throws -> [Request] {
        guard let log = try? String(contentsOfFile: folder.path("log"), encoding: .utf8) else {
            return []
        }
        return log.split(separator: "\n").map { line in
            let words = line.split(separator: " ").map(String.init)
            let ends = words[2].dropFirst("bytes=".count).split(separator: "-").map { Int($0) }
            var range: Range<Int>?
            if ends.count == 2, let first = ends[0], let last = ends[1] { range = first..<last + 1 }
            return Request(
                method: words[0], path: words[1], range: range, status: Int(words[3]) ?? 0,
                sent: Int(words[4]) ?? 0)
        }
    }
}

/// nginx with a folder of files. It ends when this object is released.
public final class Nginx {
    public let port: Int
    public let securePort: Int
    /// A unix socket of the same server.
    public let socket: String
    /// The certificate of the authority that the server's is signed by.
    public let authority: String
    /// A certificate and key that the server accepts at `/private/`.
    public let clientCertificate: String
    /// The log: one line for each request: status, range, bytes of the body, method,
    /// path, version of HTTP.
    public let log: String
    private let process: RunningProcess
    private let folder: TempFolder

    public static let isInstalled = hasProgram("nginx") && hasProgram("openssl")

    /// Serves the files of a folder below `/`, below `/plain/` without ranges, below `/user/` for
    /// `user:pass word`, below `/private/` for clients with a certificate, and redirects `/moved/`
    /// to `/`.
    public init(_ files: String) throws {
        let folder = try TempFolder()
        self.folder = folder
        authority = folder.path("ca.pem")
        clientCertificate = folder.path("client.pem")
        socket = folder.path("socket")
        log = folder.path("log")
        try Self.makeCertificates(folder)
        try Data("user:{PLAIN}pass word\n".utf8).write(
            to: URL(fileURLWithPath: folder.path("users")))
        for _ in 0..<10 {
            let ports = (try freePort(), try freePort())
            try Data(Self.settings(folder, files, ports).utf8)
                .write(to: URL(fileURLWithPath: folder.path("conf")))
            unlink(socket)
            let process = try RunningProcess(
                "nginx",
                ["-p", folder.path, "-c", folder.path("conf"), "-e", folder.path("errors")])
            guard process.wait(until: { canConnect(to: ports.1) }), process.isRunning else {
                continue
            }
            self.process = process
            (port, securePort) = ports
            return
        }
        throw CommandError(description: "no port for nginx")
    }

    deinit {
        process.send(SIGTERM)
        _ = try? process.wait()
    }

    public var url: String { "http://127.0.0.1:\(port)" }
    public var secureURL: String { "https://localhost:\(securePort)" }

    /// The lines of the log so far.
    public func requests() -> [String] {
        ((try? String(contentsOfFile: log, encoding: .utf8)) ?? "").split(separator: "\n")
            .map(String.init)
    }

    private static func makeCertificates(_ folder: TempFolder) throws {
        let script = """
            cd "$1"
            openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority \
                -keyout ca.key -out ca.pem
            for name in server client; do
                openssl req -newkey rsa:2048 -nodes -subj /CN=localhost \
                    -keyout $name.key -out $name.req
                echo subjectAltName=DNS:localhost > $name.ext
                openssl x509 -req -in $name.req -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                    -extfile $name.ext -out $name.crt
            done
            cat client.crt client.key > client.pem
            """
        try require("sh", ["-e", "-c", script, "sh", folder.path])
    }

    private static func settings(
        _ folder: TempFolder, _ files: String, _ ports: (Int, Int)
    ) -> String {
        """
        daemon off;
        user root;
        worker_processes 2;
        pid \(folder.path("pid"));
        events { worker_connections 256; }
        http {
            log_format short '$status "$http_range" $body_bytes_sent $request_method $uri '
                '$server_protocol';
            access_log \(folder.path("log")) short;
            client_body_temp_path \(folder.path("body"));
            proxy_temp_path \(folder.path("proxy"));
            fastcgi_temp_path \(folder.path("fastcgi"));
            uwsgi_temp_path \(folder.path("uwsgi"));
            scgi_temp_path \(folder.path("scgi"));
            sendfile on;
            tcp_nopush off;
            server {
                listen 127.0.0.1:\(ports.0);
                listen unix:\(folder.path("socket"));
                listen 127.0.0.1:\(ports.1) ssl http2;
                ssl_certificate \(folder.path("server.crt"));
                ssl_certificate_key \(folder.path("server.key"));
                ssl_client_certificate \(folder.path("ca.pem"));
                ssl_verify_client optional;
                location / { root \(files); }
                location /plain/ { alias \(files)/; max_ranges 0; }
                location /moved/ { rewrite ^/moved/(.*)$ /$1 redirect; }
                location /user/ {
                    alias \(files)/;
                    auth_basic x;
                    auth_basic_user_file \(folder.path("users"));
                }
                location /private/ {
                    if ($ssl_client_verify != SUCCESS) { return 403; }
                    alias \(files)/;
                }
            }
        }
        """
    }
}
