import Foundation
import TestSupport
import Testing

/// Disks that an ovirt-imageio daemon serves, as sources and as targets.
@Suite(
    .enabled(
        if: Qemu.isInstalled && ImageioDaemon.isInstalled && NBDTestServer.isInstalled,
        "needs ovirt-imageio, qemu-nbd and qemu-img"))
struct ImageioTests {
    private static let size = 10 << 20
    private let folder: TempFolder
    private let raw: String

    init() throws {
        folder = try TempFolder()
        raw = try DiskSketch(
            "A1-aB2+0C" + String(repeating: "3--d4E-", count: 8), cluster: 131072, size: Self.size
        ).writeRaw(folder.path("disk.raw"))
    }

    private func expectEqual(_ path: String, _ format: String = "raw") throws {
        #expect(try Qemu.difference(path, format, raw, "raw") == nil)
    }

    /// A file full of other data, to be overwritten.
    private func target(_ name: String) throws -> String {
        let path = folder.path(name)
        try Data(repeating: 0xaa, count: Self.size).write(to: URL(fileURLWithPath: path))
        return path
    }

    private func oddURI(_ daemon: OddServer) -> String {
        daemon.url.replacing("http://", with: "imageio+http://").replacing(
            "/disk", with: "/images/t")
    }

    @Test(arguments: [false, true])
    func uploadsAndDownloadsFiles(_ isSecure: Bool) throws {
        let path = try target("target.raw")
        let daemon = try ImageioDaemon("file://" + path, size: Self.size, isSecure: isSecure)
        let proof = isSecure ? ["--cacert", daemon.authority] : []
        let up = try Swimg.convert(proof + ["-n", "-f", "raw", "-O", "raw", raw, daemon.uri])
        #expect(up.isSuccess, "\(up)")
        try expectEqual(path)
        let down = try Swimg.convert(proof + ["-O", "raw", daemon.uri, folder.path("out")])
        #expect(down.isSuccess, "\(down)")
        try expectEqual(folder.path("out"))
        if isSecure {
            let refused = try Swimg.convert("-O", "raw", daemon.uri, folder.path("out2"))
            #expect(refused.status == 1 && refused.errorText.contains("certificate"), "\(refused)")
        }
    }

    @Test(arguments: ["raw", "qcow2"])
    func goesThroughNBD(_ format: String) throws {
        let path = folder.path("disk." + format)
        try Qemu.img("create", "-q", "-f", format, path + ".new", "\(Self.size)")
        let server = try NBDTestServer.qemu(
            "-f", format, "--discard=unmap", "--detect-zeroes=unmap", path + ".new")
        let daemon = try ImageioDaemon("nbd:unix:" + server.socket, size: Self.size)
        let up = try Swimg.convert("-n", "-f", "raw", "-O", "raw", "-W", raw, daemon.uri)
        #expect(up.isSuccess, "\(up)")
        let same = try run(Swimg.path, ["compare", daemon.uri, raw])
        #expect(same.isSuccess, "\(same)")
        // The daemon's extents steer the reading: zeros are not read.
        let down = try Swimg.convert("-O", "qcow2", daemon.uri, folder.path("out.qcow2"))
        #expect(down.isSuccess, "\(down)")
        try expectEqual(folder.path("out.qcow2"), "qcow2")
        let lines = daemon.log
        func last(_ word: String) -> Int? { lines.lastIndex { $0.contains(word) } }
        let flush = try #require(lines.firstIndex { $0.contains(" FLUSH ") })
        #expect(try #require(last(" WRITE ")) < flush && #require(last(" ZERO ")) < flush)
        #expect(!lines.contains { $0.contains("flush=True") })
        // A flush on each connection that wrote; a thread of the daemon serves one.
        func threads(_ words: String...) -> Set<Substring> {
            Set(
                lines.filter { line in words.contains { line.contains($0) } }
                    .compactMap { $0.split(separator: " (")[1].split(separator: ")").first })
        }
        #expect(threads(" FLUSH ") == threads(" WRITE ", " ZERO "))
        let read = lines.filter { $0.contains(" READ ") }.compactMap { line in
            line.split(separator: " ").first { $0.hasPrefix("size=") }
                .flatMap { Int($0.dropFirst("size=".count)) }
        }.reduce(0, +)
        #expect(read < 2 * Self.size, "\(read)")
        server.end()
        try expectEqual(path + ".new", format)
    }

    @Test func prefersTheSocket() throws {
        let path = try target("target.raw")
        let daemon = try ImageioDaemon(
            "file://" + path, size: Self.size, isSecure: true, hasSocket: true)
        for (number, words) in [["--cacert", daemon.authority, daemon.uri], [daemon.socketURI]]
            .enumerated()
        {
            let outcome = try Swimg.convert(
                words.dropLast() + ["-n", "-f", "raw", "-O", "raw", raw, words[words.count - 1]])
            #expect(outcome.isSuccess, "\(number): \(outcome)")
        }
        try expectEqual(path)
        let writes = daemon.log.filter { $0.contains(" WRITE ") }
        #expect(!writes.isEmpty && writes.allSatisfy { $0.contains("[local]") }, "\(writes)")
    }

    @Test func storesWholeImages() throws {
        let path = try target("target.qcow2")
        try Data().write(to: URL(fileURLWithPath: path))
        truncate(path, 12 << 20)
        let daemon = try ImageioDaemon("file://" + path, size: 12 << 20)
        let up = try Swimg.convert("-f", "raw", "-O", "qcow2", raw, daemon.uri)
        #expect(up.isSuccess, "\(up)")
        try expectEqual(path, "qcow2")
        #expect(try Qemu.damage(path) == nil)
        let down = try Swimg.convert("-f", "qcow2", "-O", "raw", daemon.uri, folder.path("out"))
        #expect(down.isSuccess, "\(down)")
        try expectEqual(folder.path("out"))
    }

    /// A daemon that knows neither OPTIONS nor extents nor zeros: one connection, plain writes.
    @Test func worksWithAnOldDaemon() throws {
        let daemon = try OddServer(try target("target.raw"))
        let uri = oddURI(daemon)
        let up = try Swimg.convert("-n", "-f", "raw", "-O", "raw", raw, uri)
        #expect(up.isSuccess, "\(up)")
        let down = try Swimg.convert("-f", "raw", "-O", "raw", uri, folder.path("out"))
        #expect(down.isSuccess, "\(down)")
        try expectEqual(folder.path("out"))
        #expect(try !daemon.requests().contains { $0.method == "PATCH" })
    }

    /// Lists of extents with overflowing or negative lengths, with a gap, and without lengths.
    @Test(arguments: 1...4)
    func refusesWildExtents(_ number: Int) throws {
        let daemon = try OddServer(raw, "wild=\(number)")
        let uri = oddURI(daemon)
        let outcome = try Swimg.convert("-f", "raw", "-O", "raw", uri, folder.path("out"))
        #expect(outcome.status == 1 && outcome.errorText.contains("no sense"), "\(outcome)")
        #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
        #expect(!FileManager.default.fileExists(atPath: folder.path("out")))
    }

    @Test func saysWhatTheServerSays() throws {
        let path = try target("target.raw")
        let daemon = try ImageioDaemon("file://" + path, size: Self.size, operations: ["read"])
        let readOnly = try Swimg.convert("-n", "-f", "raw", "-O", "raw", raw, daemon.uri)
        #expect(readOnly.status == 1 && readOnly.errorText.contains("only reading"), "\(readOnly)")
        let unknown = try Swimg.convert(
            "-O", "raw", daemon.uri.replacing("secret-ticket", with: "wrong-ticket"),
            folder.path("out"))
        #expect(unknown.status == 1 && unknown.errorText.contains("403"), "\(unknown)")
        let half = try ImageioDaemon("file://" + path, size: Self.size / 2)
        let forbidden = try Swimg.convert("-n", "-f", "raw", "-O", "raw", raw, half.uri)
        #expect(forbidden.status == 1 && forbidden.errorText.contains("416"), "\(forbidden)")
        truncate(path, 1 << 20)
        let tooLarge = try Swimg.convert("-n", "-f", "raw", "-O", "raw", raw, half.uri)
        #expect(
            tooLarge.status == 1 && tooLarge.errorText.contains("is smaller"), "\(tooLarge)")
        let tooMuch = try Swimg.convert("-f", "raw", "-O", "qcow2", raw, half.uri)
        #expect(tooMuch.status == 1 && tooMuch.errorText.contains("too small"), "\(tooMuch)")
        for outcome in [readOnly, unknown, forbidden, tooLarge, tooMuch] {
            #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
            #expect(!outcome.errorText.contains("-ticket"), "\(outcome)")
        }
        #expect(!FileManager.default.fileExists(atPath: folder.path("out")))
    }

    // MARK: --verify

    /// The daemon's checksum of what it holds is that of what was converted.
    @Test(arguments: ["file", "raw", "qcow2"], ["-W", "-m1", "-S0"])
    func verifies(_ backend: String, _ mode: String) throws {
        // Data and zeros that split the blocks of 2 MiB, and a short block of zeros at the end.
        let size = (9 << 20) + 3 * 4096
        let raw = try DiskSketch(
            "A" + String(repeating: "-", count: 11) + String(repeating: "3-d4E---", count: 7),
            cluster: 131072, size: size
        ).writeRaw(folder.path("odd.raw"))
        let source = folder.path("odd.qcow2")
        try Qemu.img("convert", "-c", "-O", "qcow2", raw, source)
        let path = folder.path("target")
        try Qemu.img("create", "-q", "-f", backend == "qcow2" ? backend : "raw", path, "\(size)")
        let server =
            backend == "file"
            ? nil : try NBDTestServer.qemu("-f", backend, "--detect-zeroes=on", path)
        let url = server.map { "nbd:unix:" + $0.socket } ?? "file://" + path
        let daemon = try ImageioDaemon(url, size: size)
        for words in [["-f", "raw", raw], ["-f", "qcow2", source]] {
            let outcome = try Swimg.convert(
                ["-n", "--verify", "--expect-digest", try blkhash(raw), mode, "-O", "raw"] + words
                    + [daemon.uri])
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        }
        let lines = daemon.log.filter { $0.contains(" FLUSH ") || $0.contains(" CHECKSUM ") }
        #expect(lines.count { $0.contains(" CHECKSUM ") } == 2)
        #expect(try #require(lines.first).contains(" FLUSH "))
        #expect(try #require(lines.last).contains(" CHECKSUM "), "flushed before, and then no more")
    }

    /// The disk was said to read as zeros, and does not.
    @Test func noticesOtherContent() throws {
        let daemon = try ImageioDaemon("file://" + (try target("target.raw")), size: Self.size)
        let words = ["-n", "--target-is-zero", "-f", "raw", "-O", "raw", raw, daemon.uri]
        #expect(try Swimg.convert(words).isSuccess)
        let outcome = try Swimg.convert(["--verify"] + words)
        #expect(outcome.status == 1 && outcome.errorText.contains("checksum"), "\(outcome)")
        #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
    }

    @Test func refusesToVerify() throws {
        let new = folder.path("new")
        let path = try target("target.raw")
        let larger = try ImageioDaemon("file://" + path, size: Self.size)
        let half = folder.path("half.raw")
        try FileManager.default.copyItem(atPath: raw, toPath: half)
        truncate(half, off_t(Self.size / 2))
        let old = try OddServer(path)
        for (words, reason) in [
            (["-O", "raw", raw, new], "--verify needs"),
            (["-n", "-O", "qcow2", raw, larger.uri], "--verify needs"),
            (["-n", "-O", "raw", half, larger.uri], "cannot be verified"),
            (["-n", "-O", "raw", raw, oddURI(old)], "no checksums"),
        ] {
            let outcome = try Swimg.convert(["--verify", "-f", "raw"] + words)
            #expect(outcome.status == 1 && outcome.errorText.contains(reason), "\(outcome)")
            #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
        }
        #expect(!FileManager.default.fileExists(atPath: new))
        #expect(!larger.log.contains { $0.contains(" WRITE ") || $0.contains(" ZERO ") })
        #expect(try !old.requests().contains { $0.method == "PUT" })
    }

    // MARK: failures

    @Test(arguments: ["busy=3", "short=3", "reset=3"])
    func repeatsReads(_ fault: String) throws {
        let daemon = try OddServer(raw, fault)
        let words = ["-f", "raw", "-O", "raw", oddURI(daemon), folder.path("out")]
        let outcome = try Swimg.convert(words)
        #expect(outcome.isSuccess, "\(outcome)")
        try expectEqual(folder.path("out"))
        // The last bytes may outrun the reset.
        guard fault != "reset=3" else { return }
        let impatient = try Swimg.convert(["--retries", "0"] + words)
        #expect(impatient.status == 1, "\(impatient)")
        #expect(impatient.errorText.split(separator: "\n").count == 1, "\(impatient)")
    }

    /// The daemon may still be busy with a write whose connection is lost, so it must not come
    /// again; libcurl would send it again by itself.
    @Test(arguments: [["lostput=2"], ["lostput=2", "gone"]])
    func neverRepeatsWrites(_ faults: [String]) throws {
        let daemon = try OddServer(try target("target.raw"), faults)
        let outcome = try Swimg.convert("-n", "-f", "raw", "-O", "raw", raw, oddURI(daemon))
        #expect(outcome.status == 1 && outcome.errorText.contains("cannot write"), "\(outcome)")
        // The reason is asked for, because the answer to the write may be lost.
        #expect(outcome.errorText.contains("expired") == (faults.count > 1), "\(outcome)")
        #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
        let ranges = try daemon.requests().filter { $0.method == "PUT" }.map(\.range)
        #expect(ranges.count >= 2 && Set(ranges).count == ranges.count, "\(ranges)")
    }

    @Test func endsWhenTheTicketIsTakenBack() throws {
        let disk = try NBDTestServer.nbdkit(
            "--filter=delay", "memory", "\(Self.size)", "wdelay=1", "delay-zero=1")
        let daemon = try ImageioDaemon("nbd:unix:" + disk.socket, size: Self.size)
        let upload = try Swimg.start(["-n", "-f", "raw", "-O", "raw", raw, daemon.uri])
        #expect(upload.wait(until: { daemon.log.contains { $0.contains(" WRITE ") } }))
        try daemon.cancel()
        let outcome = try upload.wait(timeout: 20)
        #expect(outcome.status == 1 && outcome.errorText.contains("403"), "\(outcome)")
        #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
        #expect(!outcome.errorText.contains("secret"), "\(outcome)")
    }

    /// The source takes longer to answer than the ticket lives without a request.
    @Test func endsWhenTheTicketExpires() throws {
        let source = try NBDTestServer.nbdkit(
            "--filter=delay", "pattern", "\(Self.size)", "rdelay=4")
        let daemon = try ImageioDaemon(
            "file://" + (try target("target.raw")), size: Self.size, timeout: 2)
        let outcome = try Swimg.convert(
            "-n", "-f", "raw", "-O", "raw", "nbd+unix:///?socket=\(source.socket)", daemon.uri,
            timeout: 20)
        #expect(outcome.status == 1 && outcome.errorText.contains("expired"), "\(outcome)")
        #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
    }
}
