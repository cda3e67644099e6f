import Foundation
import TestSupport
import Testing

/// Exports with TLS: the ways in which a server proves its identity, and the refusals without
/// proof. nbdinfo, like other clients of libnbd before 1.18.5 and 1.20.2, accepts most of these
/// cases.
@Suite(.enabled(if: NBDTestServer.isInstalled && hasProgram("certtool"), "needs nbdkit, certtool"))
struct NBDSecurityTests {
    private let folder: TempFolder

    init() throws {
        folder = try TempFolder()
        try DiskSketch("A1b0+-CC", cluster: 65536).writeRaw(folder.path("disk"))
        for (place, host) in [
            ("right", "localhost"), ("unknown", "localhost"), ("elsewhere", "example.com"),
        ] {
            try makeAuthority(place, server: host)
        }
    }

    /// Makes a certificate authority with the certificate of one server, and a folder for clients.
    private func makeAuthority(_ place: String, server host: String) throws {
        let files = try folder.makeFolder(place)
        let clients = try folder.makeFolder("\(place)-clients")
        func template(_ name: String, _ text: String) throws {
            try Data(text.utf8).write(to: URL(fileURLWithPath: "\(files)/\(name)"))
        }
        try template("ca.info", "cn = test\nca\ncert_signing_key\n")
        try template(
            "server.info",
            "cn = \(host)\ndns_name = \(host)\ntls_www_server\nencryption_key\nsigning_key\n")
        for line in [
            "--generate-privkey --ecc --outfile ca-key.pem",
            "--generate-self-signed --load-privkey ca-key.pem --template ca.info --outfile ca-cert.pem",
            "--generate-privkey --ecc --outfile server-key.pem",
            "--generate-certificate --load-ca-certificate ca-cert.pem --load-ca-privkey ca-key.pem "
                + "--load-privkey server-key.pem --template server.info --outfile server-cert.pem",
        ] {
            try require("certtool", line.words, in: files)
        }
        try FileManager.default.copyItem(
            atPath: "\(files)/ca-cert.pem", toPath: "\(clients)/ca-cert.pem")
    }

    private func convert(_ name: String) throws -> Outcome {
        try Swimg.convert("-f", "raw", "-O", "raw", name, folder.path("target"))
    }

    private func expectContent(_ name: String) throws {
        let outcome = try convert(name)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        try require("cmp", [folder.path("disk"), folder.path("target")])
    }

    private func expectRefusal(_ name: String, says words: String) throws {
        let outcome = try convert(name)
        #expect(outcome.status == 1 && outcome.errorText.contains(words), "\(outcome)")
        #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
        #expect(!folder.names.contains("target"))
    }

    private func serve(_ place: String, _ body: (_ host: String) throws -> Void) throws {
        let arguments = [
            "-r", "--tls=require", "--tls-certificates=\(folder.path(place))", "file",
            folder.path("disk"),
        ]
        try NBDTestServer.withPort(arguments) { try body("nbds://localhost:\($0)/") }
    }

    @Test func theAuthorityThatWasNamedVouches() throws {
        try serve("right") { host in
            try expectContent("\(host)?tls-certificates=\(folder.path("right-clients"))")
        }
    }

    @Test func anUnknownAuthorityDoesNotVouch() throws {
        try serve("right") { host in
            let name = "\(host)?tls-certificates=\(folder.path("unknown-clients"))"
            try expectRefusal(name, says: "certificate")
            try expectRefusal("\(name)&tls-verify-peer=true", says: "certificate")
        }
    }

    @Test func anotherHostsCertificateIsNoProof() throws {
        try serve("elsewhere") { host in
            try expectRefusal(
                "\(host)?tls-certificates=\(folder.path("elsewhere-clients"))",
                says: "certificate")
        }
    }

    @Test func whatCannotBeReadIsNoProof() throws {
        try serve("right") { host in
            try expectRefusal("\(host)?tls-certificates=/nonexistent", says: "/nonexistent")
            try expectRefusal("\(host)?tls-psk-file=/nonexistent", says: "/nonexistent")
            // Newer libraries consult the system's authorities, which do not know this one.
            try expectRefusal(host, says: "certificate")
            try expectRefusal("\(host)?tls-verify-peer=maybe", says: "neither true nor false")
        }
    }

    /// libnbd searches the user's own folder by default.
    @Test(.enabled(if: geteuid() == 0 && hasProgram("setpriv"), "needs root and setpriv"))
    func theUsualFolderIsUsed() throws {
        for (place, isKnown) in [("right-clients", true), ("unknown-clients", false)] {
            let home = try folder.makeFolder("home-\(place)/.pki/libnbd")
            try FileManager.default.copyItem(
                atPath: "\(folder.path(place))/ca-cert.pem", toPath: "\(home)/ca-cert.pem")
            try require("chmod", ["-R", "a+rX", folder.path])
            try serve("right") { host in
                let outcome = try run(
                    "setpriv",
                    [
                        "--reuid", "65534", "--clear-groups", "env",
                        "HOME=\(folder.path("home-\(place)"))", Swimg.path, "info", "-f", "raw",
                        host,
                    ])
                #expect(outcome.isSuccess == isKnown, "\(outcome)")
                #expect(isKnown || outcome.errorText.contains("certificate"), "\(outcome)")
            }
        }
    }

    /// `tls-verify-peer=false` explicitly disables verification.
    @Test func anyServerWillDoWhereAPersonSaysSo() throws {
        for place in ["right", "elsewhere"] {
            try serve(place) { host in
                try expectContent("\(host)?tls-verify-peer=false")
                try expectContent(
                    "\(host)?tls-certificates=\(folder.path("unknown-clients"))"
                        + "&tls-verify-peer=false")
            }
        }
    }

    /// libnbd before 1.18.5 and 1.20.2 verifies nothing for unix sockets.
    @Test func certificatesBehindAUnixSocket() throws {
        let server = try NBDTestServer.nbdkit(
            "-r", "--tls=require", "--tls-certificates=\(folder.path("right"))", "file",
            folder.path("disk"))
        func name(_ clients: String) -> String {
            "nbds+unix:///?socket=\(server.socket)&tls-certificates=\(folder.path(clients))"
        }
        try expectRefusal(name("unknown-clients"), says: "certificate")
        try expectContent(name("unknown-clients") + "&tls-verify-peer=false")
    }

    @Test func encryptsWithAKey() throws {
        let keys = folder.path("keys")
        try Data("alice:0123456789abcdef0123456789abcdef\n".utf8).write(
            to: URL(fileURLWithPath: keys))
        let server = try NBDTestServer.nbdkit(
            "-r", "--tls=require", "--tls-psk=\(keys)", "file", folder.path("disk"))
        try expectContent("nbds+unix://alice@/?socket=\(server.socket)&tls-psk-file=\(keys)")
        let others = folder.path("others")
        try Data("alice:ffffffffffffffffffffffffffffffff\n".utf8).write(
            to: URL(fileURLWithPath: others))
        try FileManager.default.removeItem(atPath: folder.path("target"))
        try expectRefusal(
            "nbds+unix://alice@/?socket=\(server.socket)&tls-psk-file=\(others)",
            says: "cannot connect")
        try expectRefusal(server.uri, says: "cannot connect")
    }
}
