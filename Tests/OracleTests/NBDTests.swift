import Foundation
import Glibc
import TestSupport
import Testing

/// Live servers: the requests they get and the data they hold afterwards.
@Suite(.enabled(if: Qemu.isInstalled && NBDTestServer.isInstalled, "needs nbdkit and qemu-nbd"))
struct NBDTests {
    private let folder: TempFolder

    init() throws { folder = try TempFolder() }

    @Test(arguments: ["raw-sparse", "zeros-written", "zstd-64k", "chain-deep"], ["raw", "qcow2"])
    func readsWhatQemuServes(_ name: String, _ format: String) throws {
        let source = try SourceGallery.named(name)
        let server = try NBDTestServer.qemu("-r", "-f", source.format, source.path)
        let target = folder.path("target")
        let outcome = try Swimg.convert("-f", "raw", "-O", format, server.uri, target)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try Qemu.difference(source.path, source.format, target, format) == nil)
    }

    @Test(arguments: ["raw-sparse", "v3-64k", "zlib-64k-v2"])
    func readsImagesOnAServer(_ name: String) throws {
        let source = try SourceGallery.named(name)
        let server = try NBDTestServer.nbdkit("-r", "file", source.path)
        let target = folder.path("target")
        let outcome = try Swimg.convert("-O", "raw", server.uri, target)
        try expectContent(target, outcome)
    }

    /// Old data of a target must not show, and its new data must be on the server at the end.
    @Test(arguments: [
        [], ["--filter=nozero"], ["--filter=noextents"],
        ["--filter=multi-conn", "multi-conn-mode=emulate"],
        ["--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-error-policy=error"],
        [
            "--filter=blocksize-policy", "blocksize-minimum=65536", "blocksize-preferred=65536",
            "blocksize-error-policy=error",
        ],
        ["--filter=blocksize-policy", "blocksize-maximum=32768", "blocksize-error-policy=error"],
    ])
    func writesToAServer(_ filters: [String]) throws {
        let source = try SourceGallery.named("raw-sparse")
        let size = SourceGallery.content.count.roundedUpTo(1 << 16)
        let file = folder.path("export")
        #expect(
            FileManager.default.createFile(
                atPath: file, contents: Data(repeating: 0xaa, count: size)))
        let plugin = filters.filter { $0.hasPrefix("-") } + ["file", file]
        let server = try NBDTestServer.nbdkit(plugin + filters.filter { !$0.hasPrefix("-") })
        for options in [[], ["-W"], ["--connections", "1", "--requests", "1"], ["--multi-conn"]] {
            let outcome = try Swimg.convert(
                options + ["-n", "-f", "raw", "-O", "raw", source.path, server.uri])
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
            let bytes = try #require(FileManager.default.contents(atPath: file))
            let count = SourceGallery.content.count
            #expect(mismatch(bytes.prefix(count), SourceGallery.content) == nil, "\(outcome)")
            #expect(
                bytes.dropFirst(count).allSatisfy { $0 == 0xaa }, "the tail changed: \(outcome)")
            try Data(repeating: 0xaa, count: size).write(to: URL(fileURLWithPath: file))
        }
    }

    @Test(arguments: ["", "-W", "-c"])
    func writesQcow2ToAServer(_ options: String) throws {
        let source = try SourceGallery.named("chain-deep")
        let server = try NBDTestServer.nbdkit("memory", "64M")
        let outcome = try Swimg.convert(
            options.words + ["-f", source.format, "-O", "qcow2", source.path, server.uri])
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(try Qemu.difference(source.path, source.format, server.uri, "qcow2") == nil)
        #expect(try Qemu.damage(server.uri) == nil)
    }

    /// Clusters and runs of compressed ones can begin and end within the server's blocks: when one
    /// worker writes a block back, it must not undo its neighbour's write.
    @Test(arguments: [4096, 65536])
    func packedClustersShareBlocks(_ block: Int) throws {
        // Each cluster compresses to a different length.
        var bytes: [UInt8] = []
        for cluster in 0..<256 {
            let count = cluster * 1237 % 60_000
            bytes += noise(UInt64(cluster), count)
            bytes += [UInt8](repeating: 7, count: 65536 - count)
        }
        let disk = try folder.write("disk.raw", bytes)
        for options in [
            "-c", "-c -W -m 16", "-c -W -m 16 -o cluster_size=512",
        ] {
            let server = try NBDTestServer.nbdkit(
                "--filter=blocksize-policy", "memory", "64M", "blocksize-minimum=\(block)",
                "blocksize-preferred=\(block)", "blocksize-error-policy=error")
            let outcome = try Swimg.convert(
                options.words + ["-f", "raw", "-O", "qcow2", disk, server.uri])
            #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
            #expect(try Qemu.difference(disk, "raw", server.uri, "qcow2") == nil, "\(outcome)")
            #expect(try Qemu.damage(server.uri) == nil, "\(outcome)")
        }
    }

    /// The plugin returns random data in places and refuses writes of other data there.
    @Test(arguments: [1, 2, 4, 8])
    func whatIsReadIsWrittenBack(_ connections: Int) throws {
        let server = try NBDTestServer.nbdkit("sparse-random", "size=2G", "seed=7")
        let outcome = try Swimg.convert(
            "-n", "-f", "raw", "-O", "raw", "--connections", "\(connections)", server.uri,
            server.uri)
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
    }

    private struct Operation {
        let name: String
        let range: Range<Int>
        let connection: String
    }

    /// The requests in a log of nbdkit's filter, in the order of their start.
    private func operations(_ log: String) throws -> [Operation] {
        try String(contentsOfFile: log, encoding: .utf8).split(separator: "\n").compactMap { line in
            let words = line.split(separator: " ").map(String.init)
            guard let connection = words.first(where: { $0.hasPrefix("connection=") }),
                let name = words.dropFirst(3).first, !name.hasPrefix("...")
            else { return nil }
            func number(_ key: String) -> Int? {
                words.first { $0.hasPrefix("\(key)=0x") }.flatMap {
                    Int($0.dropFirst(key.count + 3), radix: 16)
                }
            }
            let start = number("offset") ?? 0
            return Operation(
                name: name, range: start..<start + (number("count") ?? 0), connection: connection)
        }
    }

    @Test func readsDataOnceAndHolesNever() throws {
        let log = folder.path("log")
        let server = try NBDTestServer.nbdkit(
            "-r", "--filter=log", "data", "( 0x11*600000 @0x400000 0x22*5000 @0x3000000 0x33 )",
            "size=64M", "logfile=\(log)")
        let target = folder.path("target")
        let outcome = try Swimg.convert(
            "--connections", "4", "-f", "raw", "-O", "raw", server.uri, target)
        #expect(outcome.isSuccess, "\(outcome)")
        // Read the log before `compare` reads again.
        let own = try operations(log).filter { $0.name == "Read" }
        #expect(!own.isEmpty)
        #expect(try Qemu.difference(server.uri, "raw", target, "raw") == nil)
        server.stop()
        let total = own.reduce(0) { $0 + $1.range.count }
        let sorted = own.map(\.range).sorted { $0.lowerBound < $1.lowerBound }
        for (one, next) in zip(sorted, sorted.dropFirst()) {
            #expect(one.upperBound <= next.lowerBound, "\(one) and \(next) were both read")
        }
        // The plugin stores pages of 32 KiB: three islands of 19, 1 and 1 pages.
        #expect(total <= 21 * 32768, "\(total) bytes were read")
    }

    /// Each connection that was needed is flushed.
    @Test func flushesEachConnectionOnceAfterTheLastWrite() throws {
        let log = folder.path("log")
        let source = try SourceGallery.named("raw-sparse")
        let server = try NBDTestServer.nbdkit(
            "--filter=log", "memory", "64M", "logfile=\(log)")
        let outcome = try Swimg.convert(
            "-n", "--connections", "4", "-f", "raw", "-O", "raw", source.path, server.uri)
        #expect(outcome.isSuccess, "\(outcome)")
        server.stop()
        let all = try operations(log)
        let flushes = all.indices.filter { all[$0].name == "Flush" }
        let writers = Set(all.filter { $0.name == "Write" || $0.name == "Zero" }.map(\.connection))
        #expect(flushes.count == writers.count && !writers.isEmpty)
        #expect(Set(flushes.map { all[$0].connection }) == writers)
        let last = try #require(all.lastIndex { $0.name == "Write" || $0.name == "Zero" })
        #expect(flushes.allSatisfy { $0 > last })
        #expect(all.contains { $0.name == "Zero" })
        #expect(!all.contains { $0.name == "Read" })
    }

    @Test func aServerThatFailsIsOneClearLine() throws {
        let target = folder.path("target")
        let source = try NBDTestServer.nbdkit(
            "--filter=error", "memory", "64M", "error-pread=EIO", "error-pread-rate=100%")
        var outcome = try Swimg.convert("-f", "raw", "-O", "raw", source.uri, target)
        // Memory that was never written is a hole, and holes are not read.
        #expect(outcome.isSuccess, "\(outcome)")
        let full = try NBDTestServer.nbdkit(
            "--filter=error", "memory", "64M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%")
        let gallery = try SourceGallery.named("raw-sparse")
        outcome = try Swimg.convert("-n", "-O", "raw", gallery.path, full.uri)
        #expect(outcome.status == 1)
        #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
        #expect(outcome.errorText.contains("cannot write"), "\(outcome)")
        #expect(outcome.errorText.contains("No space left on device"), "\(outcome)")
    }

    @Test func aServerThatIsNotThereIsOneClearLine() throws {
        let outcome = try Swimg.convert(
            "-f", "raw", "nbd+unix:///?socket=\(folder.path("none"))", folder.path("target"))
        #expect(outcome.status == 1)
        #expect(outcome.errorText.contains("cannot connect"), "\(outcome)")
        #expect(outcome.errorText.contains("No such file or directory"), "\(outcome)")
        #expect(outcome.errorText.split(separator: "\n").count == 1, "\(outcome)")
        #expect(access(folder.path("target"), F_OK) != 0)
    }

    @Test func anExportThatIsTooSmallOrReadOnlyIsRefused() throws {
        let source = try SourceGallery.named("raw-sparse")
        let small = try NBDTestServer.nbdkit("memory", "1M")
        let fixed = try NBDTestServer.nbdkit("-r", "memory", "64M")
        for (server, reason) in [(small, "smaller"), (fixed, "read-only")] {
            let outcome = try Swimg.convert("-n", "-O", "raw", source.path, server.uri)
            #expect(outcome.status == 1)
            #expect(outcome.errorText.contains(reason), "\(outcome)")
        }
    }

    /// The server is killed during the conversion, and a new one replaces it.
    @Test(arguments: [true, false])
    func aLostConnectionIsMadeAnew(_ isSource: Bool) throws {
        let disk = folder.path("disk")
        let target = folder.path("target")
        let bytes = Data((0..<(16 << 20)).map { UInt8(truncatingIfNeeded: $0 &* 31 >> 8 | 1) })
        try bytes.write(to: URL(fileURLWithPath: disk))
        try Data(count: bytes.count).write(to: URL(fileURLWithPath: target))
        let place = try TempFolder()
        let arguments = [
            "--filter=delay", "file", isSource ? disk : target, "delay-read=200ms",
            "delay-write=200ms",
        ]
        let first = try NBDTestServer.nbdkit(arguments, folder: place)
        let options = [
            "-n", "-f", "raw", "-O", "raw", "--connections", "2", "--requests", "1",
            "--reconnect", "20",
        ]
        let running = try Swimg.start(
            options + (isSource ? [first.uri, target] : [disk, first.uri]))
        #expect(running.wait(until: { running.hasOpen(isSource ? target : disk) }))
        usleep(300_000)
        #expect(running.isRunning, "it was over before the server was killed")
        first.stop()
        let second = try NBDTestServer.nbdkit(arguments, folder: place)
        let outcome = try running.wait()
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        second.stop()
        let result = try #require(FileManager.default.contents(atPath: target))
        #expect(mismatch(result, bytes) == nil)
    }

    @Test func aServerThatStallsIsGivenUp() throws {
        let server = try NBDTestServer.nbdkit(
            "--filter=delay", "pattern", "64M", "delay-read=300")
        let target = folder.path("target")
        let outcome = try Swimg.convert(
            ["--timeout", "1", "-f", "raw", "-O", "raw", server.uri, target], timeout: 20)
        #expect(outcome.status == 1)
        #expect(outcome.errorText.contains("has not answered for 1 seconds"), "\(outcome)")
        #expect(access(target, F_OK) != 0)
    }

    /// Data that arrives slowly but steadily is no timeout, however long a single answer takes.
    @Test func aSlowAnswerIsNotAStall() throws {
        let server = try NBDTestServer.nbdkit("pattern", "1M")
        // 1 MiB in about 2.5 s.
        let link = try SlowLink(to: server.socket, piece: 16384, pause: 40_000)
        let target = folder.path("target")
        let start = ContinuousClock.now
        let outcome = try Swimg.convert([
            "--connections", "1", "--timeout", "1", "-f", "raw", "-O", "raw", link.uri, target,
        ])
        #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
        #expect(ContinuousClock.now - start > .seconds(2), "the link was not slow")
        #expect(try Qemu.difference(server.uri, "raw", target, "raw") == nil)
    }

    /// The longest request comes first, because a server's allocator keeps memory that was
    /// requested once, which smaller later requests can reuse.
    @Test func oneLongRequestComesFirst() throws {
        for (options, longest) in [([], 1 << 20), (["--request-size", "128k"], 128 << 10)] {
            let log = folder.path("log")
            let source = try NBDTestServer.nbdkit("pattern", "8M")
            let target = try NBDTestServer.nbdkit(
                "--filter=log", "memory", "8M", "logfile=\(log)")
            let outcome = try Swimg.convert(
                options + [
                    "-n", "--connections", "1", "-f", "raw", "-O", "raw", source.uri, target.uri,
                ])
            #expect(outcome.isSuccess, "\(outcome)")
            target.stop()
            let writes = try operations(log).filter { $0.name == "Write" }.map(\.range)
            let lengths = writes.map(\.count).sorted(by: >)
            #expect(lengths.reduce(0, +) == 8 << 20)
            guard options.isEmpty else {
                #expect(lengths[0] == longest, "\(lengths)")
                continue
            }
            // Where a busy machine makes calls wait, the window doubles it.
            #expect([longest, 2 * longest].contains(lengths[0]), "\(lengths)")
            #expect(lengths[1] < lengths[0], "\(lengths)")
            // Several threads of the server write the log.
            #expect(writes.prefix(4).contains { $0.count == lengths[0] }, "\(writes)")
        }
    }

    /// swimg disconnects properly instead of just closing the socket.
    @Test(arguments: ["1", "4"])
    func saysGoodbye(_ connections: String) throws {
        let server = try NBDTestServer.nbdkit("-v", "pattern", "8M")
        let target = folder.path("target")
        let outcome = try Swimg.convert(
            "--connections", connections, "-f", "raw", "-O", "raw", server.uri, target)
        #expect(outcome.isSuccess, "\(outcome)")
        let said = server.process.wait {
            let log = String(decoding: server.process.errors, as: UTF8.self)
            let accepted = log.ranges(of: "accepted connection").count
            return (1...(Int(connections) ?? 0)).contains(accepted)
                && log.ranges(of: "client sent NBD_CMD_DISC").count == accepted
        }
        #expect(said, "\(String(decoding: server.process.errors, as: UTF8.self))")
    }

    @Test func aSignalEndsTheWaitForAServer() throws {
        let server = try NBDTestServer.nbdkit(
            "--filter=delay", "pattern", "64M", "delay-read=300")
        let target = folder.path("target")
        let running = try Swimg.start(["-f", "raw", "-O", "raw", server.uri, target])
        usleep(500_000)
        running.send(SIGTERM)
        let outcome = try running.wait(timeout: 20)
        #expect(outcome.status == 128 + SIGTERM, "\(outcome)")
        #expect(access(target, F_OK) != 0)
    }
}

extension Int {
    fileprivate func roundedUpTo(_ multiple: Int) -> Int {
        (self + multiple - 1) / multiple * multiple
    }
}

/// Expects success and the content of the gallery's images in the target.
func expectContent(_ path: String, _ outcome: Outcome) throws {
    #expect(outcome.isSuccess && outcome.errors.isEmpty, "\(outcome)")
    let bytes = try #require(FileManager.default.contents(atPath: path))
    #expect(mismatch(bytes, SourceGallery.content) == nil, "\(outcome)")
}
