import Foundation
import Glibc
import TestSupport
import Testing

/// Servers that are killed, restarted or faulty must cause an error or give the right bytes.
///
/// `SWIMG_KILLS` in the environment sets the number of conversions interrupted at random moments.
@Suite(.enabled(if: NBDTestServer.isInstalled, "needs nbdkit and qemu-nbd"))
struct NBDLossTests {
    let folder: TempFolder
    static let size = 16 << 20

    init() throws {
        folder = try TempFolder()
        try writeNoise(folder.path("disk"), count: Self.size)
        try Data(count: Self.size * 2).write(to: URL(fileURLWithPath: folder.path("target")))
    }

    /// A server that keeps writes in memory until a flush and loses them when its process ends.
    private func forgetful(_ file: String, in place: TempFolder, delay: Int) throws -> NBDTestServer
    {
        try NBDTestServer.nbdkit(
            [
                "--filter=cache", "--filter=delay", "file", folder.path(file), "rdelay=\(delay)ms",
                "wdelay=\(delay)ms",
            ], folder: place)
    }

    private func isRight(_ format: String) throws -> Bool {
        try run(
            "qemu-img",
            ["compare", "-f", "raw", "-F", format, folder.path("disk"), folder.path("target")]
        ).isSuccess
    }

    /// Kills a conversion's server, optionally starts it again, and returns the conversion's
    /// outcome.
    private func convertUnderKill(
        _ options: [String], intoServer: Bool = true, after pause: UInt32 = 500_000,
        restarts: Bool = true, delay: Int = 200, waits: Bool = true
    ) throws -> Outcome {
        let place = try TempFolder()
        let file = intoServer ? "target" : "disk"
        let server = try forgetful(file, in: place, delay: delay)
        let names =
            intoServer
            ? [folder.path("disk"), server.uri] : [server.uri, folder.path("target")]
        // A qcow2 image is created on the export; a raw one fills it.
        let isMade = options.contains("qcow2")
        let running = try Swimg.start((isMade ? [] : ["-n"]) + ["-f", "raw"] + options + names)
        if waits {
            #expect(
                running.wait(until: { running.hasOpen(folder.path(intoServer ? "disk" : "target")) }
                ))
        }
        usleep(pause)
        server.stop()
        let second = restarts ? try forgetful(file, in: place, delay: 0) : nil
        let outcome = try running.wait(timeout: 60)
        second?.end()
        return outcome
    }

    @Test(arguments: [
        "-O raw", "-O raw -W", "-O qcow2", "-O raw -t none", "-O raw -t writeback",
        "-O raw -t writethrough",
    ])
    func aLostTargetIsAnError(_ options: String) throws {
        let outcome = try convertUnderKill(options.words)
        #expect(outcome.status == 1, "\(outcome)")
        #expect(outcome.errorText.contains("socket="), "\(outcome)")
        // At that moment a further connection may have been opened for the first time.
        #expect(outcome.errorText.contains("connect"), "\(outcome)")
        #expect(outcome.errorText.filter(\.isNewline).count == 1, "\(outcome)")
    }

    @Test func aLostSourceIsAnError() throws {
        let outcome = try convertUnderKill(["-O", "raw"], intoServer: false)
        #expect(outcome.status == 1 && outcome.errorText.contains("connect"), "\(outcome)")
    }

    /// The server has FUA here; in the next test nbdkit's fua filter removes it.
    @Test(arguments: ["-O raw", "-O raw -W --connections 1", "-O qcow2", "-O raw -t writeback"])
    func aTargetIsMadeAnewWhereThatIsAllowed(_ options: String) throws {
        let outcome = try convertUnderKill(options.words + ["--reconnect", "20"])
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try isRight(options.contains("qcow2") ? "qcow2" : "raw"), "\(outcome)")
    }

    @Test func aTargetWithoutFUAIsWrittenAgain() throws {
        let place = try TempFolder()
        func start(_ delay: Int) throws -> NBDTestServer {
            try NBDTestServer.nbdkit(
                [
                    "--filter=fua", "--filter=cache", "--filter=delay", "file",
                    folder.path("target"), "wdelay=\(delay)ms",
                ], folder: place)
        }
        let server = try start(100)
        let running = try Swimg.start(
            ["-n", "-f", "raw", "-O", "raw", "--reconnect", "20", folder.path("disk"), server.uri])
        usleep(700_000)
        server.stop()
        let second = try start(0)
        let outcome = try running.wait()
        second.end()
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try isRight("raw"), "\(outcome)")
    }

    @Test func aServerThatStaysAwayIsAnError() throws {
        let start = ContinuousClock.now
        let outcome = try convertUnderKill(
            ["-O", "raw", "--reconnect", "1"], restarts: false)
        // At that moment a further connection may have been opened for the first time.
        #expect(outcome.status == 1 && outcome.errorText.contains("cannot connect"), "\(outcome)")
        #expect(ContinuousClock.now - start < .seconds(20), "\(outcome)")
    }

    static let kills = Array(
        0..<(ProcessInfo.processInfo.environment["SWIMG_KILLS"].flatMap { Int($0) } ?? 5))

    /// Kills the server at a random moment; in half of the cases a new one replaces it.
    @Test(arguments: kills)
    func anErrorOrTheRightBytes(_ number: Int) throws {
        var random = SplitMix64(seed: UInt64(number) &+ 77)
        let intoServer = random.once(in: 2)
        let format = intoServer && random.once(in: 3) ? "qcow2" : "raw"
        let outcome = try convertUnderKill(
            ["-O", format] + (random.once(in: 2) ? ["-W"] : [])
                + (random.once(in: 3) ? ["--reconnect", "10"] : []),
            intoServer: intoServer, after: UInt32(random.below(900_000)),
            restarts: random.once(in: 2), delay: random.pick([1, 20, 100]), waits: false)
        guard outcome.isSuccess else {
            #expect(outcome.status == 1 && !outcome.errors.isEmpty, "\(outcome)")
            return
        }
        // A server killed after the last flush has lost nothing.
        #expect(try isRight(format), "case \(number): \(outcome)")
    }

    @Test(arguments: [
        (RogueServer.Fault.wrongMagic, "breaks the protocol"),
        (.emptyBlockStatus, "breaks the protocol"), (.breaksOff, "connection"),
    ])
    func aServersFaultIsNamedAtOnce(_ fault: RogueServer.Fault, _ words: String) throws {
        let server = try RogueServer(fault, size: 4 << 20)
        for options in [[], ["--reconnect", "1"]] {
            let start = ContinuousClock.now
            let outcome = try Swimg.convert(
                options + [
                    "--requests", "1", "-f", "raw", "-O", "raw", server.uri, folder.path("fresh"),
                ])
            #expect(outcome.status == 1, "\(outcome)")
            #expect(outcome.errorText.contains(words), "\(outcome)")
            #expect(ContinuousClock.now - start < .seconds(5), "\(outcome)")
            #expect(!folder.names.contains("fresh"))
        }
    }

    /// The thread that receives answers may notice the end while it sends queued requests.
    @Test func anEndThatIsNoticedInSendingIsAnErrorAtOnce() throws {
        let server = try RogueServer(.stopsListening, size: 4 << 20)
        let start = ContinuousClock.now
        let outcome = try Swimg.convert(
            "--requests", "1", "-f", "raw", "-O", "raw", server.uri, folder.path("fresh"))
        #expect(outcome.status == 1 && outcome.errorText.contains("connection"), "\(outcome)")
        #expect(ContinuousClock.now - start < .seconds(5), "\(outcome)")
        #expect(!folder.names.contains("fresh"))
    }

    /// swimg then writes zeros, as qemu-img does, and asks only once instead of for each range.
    @Test func zerosAreWrittenWhereZeroingIsRefused() throws {
        let server = try RogueServer(.refusesZeroes, size: 1 << 20)
        let sketch = DiskSketch("A-0-1-b--0-A--C", cluster: 65536)
        try sketch.writeRaw(folder.path("sketch"))
        let outcome = try Swimg.convert(
            "-n", "-m", "1", "-f", "raw", "-O", "raw", folder.path("sketch"), server.uri)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(mismatch(server.bytes.prefix(sketch.size), sketch.bytes) == nil)
        #expect(server.zeroRequests == 1)
    }

    /// Inspecting an image needs one connection, which ends properly.
    @Test func aLookTakesOneConnection() throws {
        for _ in 0..<25 {
            let server = try NBDTestServer.nbdkit("-v", "-r", "file", folder.path("disk"))
            let outcome = try run(Swimg.path, ["info", "-f", "raw", server.uri])
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
            server.end()
            let log = String(decoding: server.process.errors, as: UTF8.self)
            #expect(log.ranges(of: "accepted connection").count == 1, "\(log)")
            #expect(log.ranges(of: "client sent NBD_CMD_DISC").count == 1, "\(log)")
        }
    }

    /// Unix sockets count as slow too, because a server command in brackets usually accesses remote
    /// storage.
    @Test func aSlowServerIsAskedForMoreAtOnce() throws {
        let server = try RogueServer(.takesItsTime, size: 96 << 20)
        let outcome = try Swimg.convert(
            "-f", "raw", "-O", "raw", server.uri, folder.path("target"))
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(server.mostReads >= 16, "\(server.mostReads)")
        #expect(try contents(folder.path("target")).allSatisfy { $0 == 0xee })
    }

    /// Numbers from the command line are limits.
    @Test(arguments: [
        ("--requests 2", 2), ("--requests 1 --connections 2 --multi-conn", 2), ("-m 1", 16),
    ])
    func limitsHoldForSlowServers(_ options: String, _ most: Int) throws {
        let server = try RogueServer(.takesItsTime, size: 24 << 20)
        let outcome = try Swimg.convert(
            options.words + ["-f", "raw", "-O", "raw", server.uri, folder.path("target")])
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(server.mostReads <= most, "\(server.mostReads)")
    }
}
