import Foundation
import TestSupport
import Testing

/// Files on HTTP servers as sources; what comes out is compared with the file itself.
@Suite(.enabled(if: Qemu.isInstalled && Nginx.isInstalled, "nginx serves, qemu-img judges"))
struct HTTPTests {
    private let folder: TempFolder
    private let raw: String

    init() throws {
        folder = try TempFolder()
        raw = try DiskSketch.oddlySized.writeRaw(folder.path("disk.raw"))
    }

    private func expectEqual(_ target: String, sourceLocation: SourceLocation = #_sourceLocation)
        throws
    {
        let difference = try Qemu.difference(target, "raw", raw, "raw")
        #expect(difference == nil, sourceLocation: sourceLocation)
    }

    // MARK: against nginx

    @Test func readsEveryFormat() throws {
        try Qemu.img("convert", "-O", "qcow2", raw, folder.path("disk.qcow2"))
        try Qemu.img("convert", "-c", "-O", "qcow2", raw, folder.path("small.qcow2"))
        try Qemu.img(
            "convert", "-c", "-o", "compression_type=zstd,cluster_size=4096", "-O", "qcow2", raw,
            folder.path("zstd.qcow2"))
        let server = try Nginx(folder.path)
        for name in ["disk.raw", "disk.qcow2", "small.qcow2", "zstd.qcow2"] {
            let target = folder.path("out")
            let outcome = try Swimg.convert("-O", "raw", "\(server.url)/\(name)", target)
            #expect(outcome.isSuccess, "\(name): \(outcome)")
            try expectEqual(target)
            let verbs = [
                ["info"], ["map", "--output=json"], ["measure", "-O", "qcow2"], ["digest"],
            ]
            for verb in verbs {
                let far = try run(Swimg.path, verb + ["\(server.url)/\(name)"])
                let near = try run(Swimg.path, verb + [folder.path(name)])
                #expect(far.status == near.status, "\(far)")
                // A server does not tell where a raw file has holes.
                if verb[0] == "measure", name != "disk.raw" {
                    #expect(far.outputText == near.outputText, "\(verb) \(name)")
                }
                if verb[0] == "digest" {
                    let digests = [far, near].map { $0.outputText.split(separator: " ").first }
                    #expect(digests[0] == digests[1], "\(name)")
                }
            }
            let same = try run(Swimg.path, ["compare", "\(server.url)/\(name)", raw])
            #expect(same.isSuccess, "\(same)")
        }
        let damage = try run(Swimg.path, ["check", "\(server.url)/disk.qcow2"])
        #expect(damage.isSuccess, "\(damage)")
        #expect(!server.requests().contains { $0.contains("HEAD") })
    }

    /// Names of backing files are addresses, or relative to the address of their image.
    @Test func readsBackingChains() throws {
        let server = try Nginx(folder.path)
        let names = ["disk.raw", "\(server.url)/disk.raw"]
        for (number, backing) in names.enumerated() {
            let overlay = "over\(number).qcow2"
            try Qemu.img(
                "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", overlay,
                "9961984", in: folder.path)
            let target = folder.path("out")
            let outcome = try Swimg.convert("-O", "raw", "\(server.url)/\(overlay)", target)
            #expect(outcome.isSuccess, "\(outcome)")
            try expectEqual(target)
        }
        // An image may not bring passwords along.
        try Qemu.img(
            "create", "-q", "-u", "-f", "qcow2", "-b",
            "http://a:b@127.0.0.1:\(server.port)/disk.raw",
            "-F", "raw", folder.path("secret.qcow2"), "9961984")
        let outcome = try Swimg.convert(folder.path("secret.qcow2"), folder.path("out2"))
        #expect(outcome.status == 1, "\(outcome)")
    }

    @Test func provesTheServer() throws {
        let server = try Nginx(folder.path)
        let source = "\(server.secureURL)/disk.raw"
        let target = folder.path("out")
        let refused = try Swimg.convert("-O", "raw", source, target)
        #expect(refused.status == 1 && refused.errorText.contains("certificate"), "\(refused)")
        #expect(refused.errorText.split(separator: "\n").count == 1)
        #expect(!FileManager.default.fileExists(atPath: target))
        for options in [
            ["--cacert", server.authority], ["--insecure"],
            ["--cacert", server.authority, "--http2"],
        ] {
            let outcome = try Swimg.convert(options + ["-O", "raw", source, target])
            #expect(outcome.isSuccess, "\(outcome)")
            try expectEqual(target)
            #expect(
                server.requests().last?.hasSuffix("HTTP/2.0") == options.contains("--http2"))
        }
        let described = #"json:{"driver":"raw","file":{"driver":"https","url":"\#(source)","#
        #expect(try run(Swimg.path, ["info", described + #""sslverify":"off"}}"#]).isSuccess)
        #expect(try !run(Swimg.path, ["info", described + #""sslverify":"on"}}"#]).isSuccess)
    }

    @Test func showsWhoItIs() throws {
        let server = try Nginx(folder.path)
        let target = folder.path("out")
        let place = "127.0.0.1:\(server.port)/user/disk.raw"
        for source in ["http://\(place)", "http://user:wrong@\(place)"] {
            let refused = try Swimg.convert("-O", "raw", source, target)
            #expect(refused.status == 1 && refused.errorText.contains("401"), "\(refused)")
            #expect(!refused.errorText.contains("wrong"), "\(refused)")
        }
        let netrc = folder.path(".netrc")
        try Data("machine 127.0.0.1 login user password \"pass word\"\n".utf8)
            .write(to: URL(fileURLWithPath: netrc))
        let byName = try Swimg.convert("-O", "raw", "http://user:pass%20word@\(place)", target)
        #expect(byName.isSuccess, "\(byName)")
        let byFile = try RunningProcess(
            Swimg.path, ["convert", "-O", "raw", "http://\(place)", target],
            environment: ["HOME": folder.path]
        ).wait()
        #expect(byFile.isSuccess, "\(byFile)")
        let options = ["--cacert", server.authority, "-O", "raw"]
        let restricted = "\(server.secureURL)/private/disk.raw"
        #expect(try Swimg.convert(options + [restricted, target]).errorText.contains("403"))
        let proven = try Swimg.convert(
            options + ["--cert", server.clientCertificate, restricted, target])
        #expect(proven.isSuccess, "\(proven)")
        try expectEqual(target)
    }

    @Test func goesThroughASocketAndAProxy() throws {
        let server = try Nginx(folder.path)
        let target = folder.path("out")
        let outcome = try Swimg.convert(
            "--unix-socket", server.socket, "-O", "raw", "http://nowhere/disk.raw", target)
        #expect(outcome.isSuccess, "\(outcome)")
        try expectEqual(target)
        // nginx answers a proxy's request with the file of that path.
        let proxied = try RunningProcess(
            Swimg.path, ["info", "http://nowhere.invalid/disk.raw"],
            environment: ["http_proxy": server.url]
        ).wait()
        #expect(proxied.isSuccess, "\(proxied)")
        let direct = try run(Swimg.path, ["info", "http://nowhere.invalid/disk.raw"])
        #expect(direct.status == 1 && direct.errorText.contains("resolve"), "\(direct)")
    }

    /// Each byte comes once, in few requests, and what the guest does not use does not come.
    @Test func asksOnceForEachByte() throws {
        let big = folder.path("big.raw")
        try DiskSketch(String(repeating: "1", count: 32), cluster: 1 << 20).writeRaw(big)
        try Qemu.img("create", "-q", "-f", "qcow2", folder.path("sparse.qcow2"), "64M")
        // Three places with data, and long stretches that were written and zeroed again.
        try Qemu.io(
            "qcow2", folder.path("sparse.qcow2"),
            ["write -P 1 0 40M", "write -z 4M 20M", "write -P 2 50M 3M"])
        let server = try Nginx(folder.path)
        for (name, most, sizes) in [
            ("big.raw", 32 / 2 + 20, (32 << 20)...(32 << 20)),
            ("sparse.qcow2", 23 / 2 + 20, (23 << 20)...(24 << 20)),
        ] {
            let before = server.requests().count
            let outcome = try Swimg.convert(
                "-O", "raw", "\(server.url)/\(name)", folder.path("out"))
            #expect(outcome.isSuccess, "\(outcome)")
            let requests = server.requests().dropFirst(before).map { $0.split(separator: " ") }
            #expect(requests.count <= most, "\(name): \(requests.count)")
            #expect(requests.allSatisfy { $0[0] == "206" }, "\(requests)")
            let sum = requests.reduce(0) { $0 + (Int($1[2]) ?? 0) }
            #expect(sizes.contains(sum), "\(name): \(sum)")
        }
    }

    // MARK: against servers that misbehave

    private func convert(
        _ server: OddServer, _ options: String..., path: String? = nil
    ) throws -> Outcome {
        let target = folder.path("out")
        try? FileManager.default.removeItem(atPath: target)
        let outcome = try Swimg.convert(
            options + ["-f", "raw", "-O", "raw", path ?? server.url, target])
        if outcome.isSuccess {
            try expectEqual(target)
        } else {
            #expect(!FileManager.default.fileExists(atPath: target))
            #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
        }
        return outcome
    }

    @Test(arguments: [
        ["busy=3"], ["short=3"], ["reset=3"], ["less=700000"], ["noranges"], ["notag"],
        ["noranges", "trickle=1"], ["redirect"], ["redirect", "expires=3"],
        ["short=2", "less=99999"],
        ["delay=20"],
    ])
    func reachesTheEndAllTheSame(_ faults: [String]) throws {
        let server = try OddServer(raw, faults)
        let outcome = try convert(server)
        #expect(outcome.isSuccess, "\(faults): \(outcome)")
        let requests = try server.requests()
        #expect(!requests.contains { $0.method == "HEAD" })
        if faults == ["redirect"] {
            #expect(requests.count { $0.status == 302 } == 1)
        }
        if faults.contains("expires=3") {
            #expect(requests.contains { $0.status == 403 }, "the address never expired")
        }
        if faults[0] == "noranges" {
            #expect(requests.count == 1, "\(requests)")
        }
    }

    @Test(arguments: [
        ("missing", "404"), ("token", "401"), ("gzip", "gzip"), ("wrongrange", "instead of"),
        ("changes=2", "changed"), ("changes=2 careless", "changed"),
        ("noranges nolength", "neither ranges nor the size"), ("busy=1", "503"),
    ])
    func saysWhatIsWrong(_ faults: String, _ words: String) throws {
        let server = try OddServer(raw, faults.split(separator: " ").map(String.init))
        let outcome = try convert(server, "--retries", "1")
        #expect(outcome.status == 1 && outcome.errorText.contains(words), "\(outcome)")
    }

    @Test func noticesAStall() throws {
        // The server goes on, or closes the connection, after 30 seconds.
        let start = ContinuousClock.now
        defer { #expect(ContinuousClock.now - start < .seconds(25)) }
        let stalled = try OddServer(raw, "stall=1")
        let outcome = try convert(stalled, "--timeout", "1", "--retries", "0")
        #expect(outcome.status == 1, "\(outcome)")
        let passing = try OddServer(raw, "stall=4")
        let other = try convert(passing, "--timeout", "1")
        #expect(other.isSuccess, "\(other)")
    }

    @Test func sendsHeadersAndKeepsSecrets() throws {
        let server = try OddServer(raw, "token")
        #expect(try convert(server, "--header", "Authorization: Bearer secret").isSuccess)
        let file = folder.path("headers")
        try Data("Authorization: Bearer secret\n".utf8).write(to: URL(fileURLWithPath: file))
        #expect(try convert(server, "--header", "@\(file)").isSuccess)
        let wrong = try convert(
            server, "--header", "Authorization: Bearer wrong", path: server.url + "?sig=hidden")
        #expect(wrong.errorText.contains("401"), "\(wrong)")
        #expect(!wrong.errorText.contains("wrong") && !wrong.errorText.contains("hidden"))
        for bad in ["nocolon", "@\(folder.path("none"))"] {
            let refused = try convert(server, "--header", bad)
            #expect(refused.status == 1 && refused.errorText.contains("--header"), "\(refused)")
            #expect(refused.errorText.contains("No such file") == bad.hasPrefix("@"), "\(refused)")
        }
    }

    @Test func headersAreBytes() throws {
        let server = try OddServer(raw, "utf8")
        #expect(try convert(server, "--header", "X-Name: Zoë").isSuccess)
        let file = folder.path("köpfe")
        try Data("X-Other: a\r\nX-Name: Zoë\r\n".utf8).write(to: URL(fileURLWithPath: file))
        #expect(try convert(server, "--header", "@\(file)").isSuccess)
    }

    @Test func readsImagesInOnePass() throws {
        let image = folder.path("small.qcow2")
        try Qemu.img("convert", "-c", "-O", "qcow2", raw, image)
        let server = try OddServer(image, "noranges")
        let target = folder.path("out")
        let outcome = try Swimg.convert("-f", "qcow2", "-O", "raw", server.url, target)
        #expect(outcome.isSuccess, "\(outcome)")
        try expectEqual(target)
        #expect(try server.requests().count == 1)
    }

    /// A table behind the data that it is needed for: no way in one pass.
    @Test func saysThatOnePassIsNotEnough() throws {
        let image = folder.path("late.qcow2")
        try Qemu.img("create", "-q", "-f", "qcow2", image, "2G")
        try Qemu.io(
            "qcow2", image,
            ["write -P 1 1G 20M", "write -P 1 0 2M"])
        let server = try OddServer(image, "noranges")
        let outcome = try Swimg.convert("-f", "qcow2", "-O", "raw", server.url, folder.path("out"))
        #expect(
            outcome.status == 1 && outcome.errorText.contains("download it first"), "\(outcome)")
    }

    @Test func cannotBeWritten() throws {
        let server = try OddServer(raw)
        for options in [["-O", "raw"], ["-n", "-O", "raw"], ["-O", "qcow2"]] {
            let outcome = try Swimg.convert(options + [raw, server.url])
            #expect(outcome.status == 1 && outcome.errorText.contains("only be read"), "\(outcome)")
        }
        for words in [
            ["create", "-q", "-f", "raw", server.url, "1M"],
            ["create", "-q", "-f", "qcow2", server.url, "1M"],
            ["resize", "-f", "raw", server.url, "1M"],
        ] {
            let outcome = try run(Swimg.path, words)
            #expect(outcome.status == 1 && outcome.output.isEmpty, "\(outcome)")
            #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
        }
        let closed = try Swimg.convert("-O", "raw", "http://127.0.0.1:1/x", folder.path("out"))
        #expect(closed.status == 1 && closed.errorText.contains("onnect"), "\(closed)")
    }
}
