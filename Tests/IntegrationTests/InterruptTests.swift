import Foundation
import Glibc
import TestSupport
import Testing

/// An interrupted conversion leaves no target, or leaves the existing target unchanged.
@Suite struct InterruptTests {
    let folder: TempFolder
    let targets: String

    init() throws {
        folder = try TempFolder()
        targets = try folder.makeFolder("targets")
    }

    struct Case: Sendable, CustomStringConvertible {
        let signal: Int32
        let options: String
        let oldTarget: Bool

        var description: String {
            "signal \(signal), \(options), \(oldTarget ? "over an old target" : "no old target")"
        }
    }

    @Test(arguments: [
        Case(signal: SIGINT, options: "-c -m 1 -O qcow2", oldTarget: false),
        Case(signal: SIGTERM, options: "-c -m 1 -O qcow2", oldTarget: true),
        Case(signal: SIGHUP, options: "-c -m 1 -O qcow2", oldTarget: false),
        Case(signal: SIGINT, options: "-c -m 4 -W -O qcow2", oldTarget: true),
        Case(signal: SIGTERM, options: "-c -m 4 -W -O qcow2", oldTarget: false),
    ])
    func removesWhatItBegan(_ stopped: Case) throws {
        let target = targets + "/target"
        let old = sectors("O", first: 0, count: 100)
        if stopped.oldTarget { try Data(old).write(to: URL(fileURLWithPath: target)) }
        let running = try Swimg.start(
            ["-p", "-f", "raw"] + stopped.options.words + [LargeDisk.path(), target])
        // After the first percent, the conversion is in progress.
        let past = /\(([1-9]|[1-9][0-9])\.[0-9]{2}\//
        #expect(
            running.wait(until: {
                String(decoding: running.output, as: UTF8.self).contains(past)
            }))
        running.send(stopped.signal)
        let sent = ContinuousClock.now
        let outcome = try running.wait(timeout: 20)
        #expect(outcome.status == 128 + stopped.signal, "\(outcome)")
        #expect(ContinuousClock.now - sent < .seconds(10), "slow to stop: \(outcome)")
        #expect(outcome.errorText.filter { $0.isNewline }.count <= 1, "\(outcome)")
        #expect(TempFolder.names(in: targets) == (stopped.oldTarget ? ["target"] : []))
        if stopped.oldTarget { #expect(try mismatch(contents(target), old) == nil, "\(outcome)") }
    }

    /// After SIGKILL at random moments, the target is complete or absent.
    @Test(arguments: ["-O raw", "-O qcow2", "-W -O raw", "-W -O qcow2"])
    func isWholeOrAbsentAfterAKill(_ options: String) throws {
        let target = targets + "/target"
        let source = folder.path("source")
        let size = 96 << 20
        try writeNoise(source, count: size)
        let line = ["-f", "raw"] + options.words + [source, target]
        expectSuccess(try Swimg.convert(line))
        let whole = try sha256(target)
        var random = SplitMix64(seed: 0x9)
        // In microseconds, adjusted to the speed and load of the machine: a kill before the
        // conversion started raises the limit, a kill after its end lowers it.
        var limit = 50_000
        var inTheMiddle = 0
        for round in 0..<400 where inTheMiddle < 8 {
            unlink(target)
            let running = try Swimg.start(line)
            usleep(UInt32(random.below(limit)))
            running.send(SIGSTOP)
            let hadBegun = running.hasOpen(source)
            running.kill()
            let outcome = try running.wait()
            let names = TempFolder.names(in: targets)
            if names.contains("target") {
                limit = max(limit * 3 / 4, 1000)
                #expect(try sha256(target) == whole, "round \(round): \(outcome)")
            } else if !hadBegun {
                limit = min(limit * 4 / 3, 10_000_000)
            } else {
                inTheMiddle += 1
                #expect(outcome.status == 128 + SIGKILL, "\(outcome)")
            }
            for name in names where name != "target" { unlink("\(targets)/\(name)") }
        }
        #expect(inTheMiddle == 8, "the kills came too early or too late to test anything")
    }

    @Test func leavesAnOldTargetWholeAfterAKill() throws {
        let target = targets + "/target"
        let source = folder.path("source")
        try writeNoise(source, count: 64 << 20, seed: 2)
        let old = noise(3, 300_000)
        let new = try sha256(source)
        var random = SplitMix64(seed: 0x99)
        for round in 0..<12 {
            try Data(old).write(to: URL(fileURLWithPath: target))
            let running = try Swimg.start(["-f", "raw", "-O", "raw", source, target])
            usleep(UInt32(random.below(60_000)))
            // The last round is not killed, to show that the kills are what keeps the old target.
            if round < 11 { running.kill() }
            let outcome = try running.wait()
            let isOld = try contents(target) == Data(old)
            #expect(try isOld || sha256(target) == new, "round \(round): \(outcome)")
            #expect(!isOld || round < 11, "\(outcome)")
            for name in TempFolder.names(in: targets) where name != "target" {
                unlink("\(targets)/\(name)")
            }
        }
    }
}
