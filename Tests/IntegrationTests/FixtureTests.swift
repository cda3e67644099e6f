import Foundation
import TestSupport
import Testing

/// Reads every image in `Fixtures/` without any qemu program.
@Suite struct FixtureTests {
    @Test(arguments: Fixture.good)
    func converts(_ fixture: Fixture) throws {
        let folder = try TempFolder()
        let path = try fixture.path()
        let format = fixture.format.map { ["-f", $0] } ?? []
        var commands = [format, format + ["-m", "1"], format + ["-m", "8", "-W"]]
        if fixture.probe ?? true { commands.append([]) }
        for (number, options) in commands.enumerated() {
            let target = folder.path("target-\(number).raw")
            let outcome = try Swimg.convert(options + ["-O", "raw", path, target])
            #expect(outcome.status == 0, "\(outcome)")
            #expect(outcome.output.isEmpty && outcome.errors.isEmpty, "\(outcome)")
            #expect(try sha256(target) == fixture.sha256, "\(outcome)")
        }
    }

    @Test(arguments: Fixture.good)
    func readsTheSameThroughQcow2(_ fixture: Fixture) throws {
        let folder = try TempFolder()
        let middle = folder.path("middle.qcow2")
        let target = folder.path("target.raw")
        let format = fixture.format.map { ["-f", $0] } ?? []
        let first = try Swimg.convert(format + ["-O", "qcow2", fixture.path(), middle])
        #expect(first.status == 0, "\(first)")
        let second = try Swimg.convert("-f", "qcow2", "-O", "raw", middle, target)
        #expect(second.status == 0, "\(second)")
        #expect(try sha256(target) == fixture.sha256, "\(first)\n\(second)")
    }

    @Test(arguments: Fixture.bad, ["raw", "qcow2"])
    func refuses(_ fixture: Fixture, for targetFormat: String) throws {
        let path = try fixture.path()
        let format = fixture.format.map { ["-f", $0] } ?? []
        var commands = [format + ["-m", "1"], format + ["-m", "8", "-W"]]
        if fixture.probe ?? true { commands.append([]) }
        for options in commands {
            let folder = try TempFolder()
            let outcome = try Swimg.convert(
                options + ["-O", targetFormat, path, folder.path("target")], timeout: 10)
            expectRefusal(outcome, says: fixture.refused ?? "")
            #expect(folder.names == [], "left behind by \(outcome)")
        }
    }

    @Test(arguments: Fixture.bad.filter { $0.format == nil })
    func givenFormatIsNotProbed(_ fixture: Fixture) throws {
        let folder = try TempFolder()
        let target = folder.path("target.raw")
        let outcome = try Swimg.convert("-f", "raw", "-O", "raw", fixture.path(), target)
        #expect(outcome.status == 0, "\(outcome)")
        #expect(try mismatch(contents(target), contents(fixture.path())) == nil, "\(outcome)")
    }

    @Test func manifestNamesEveryImageOnce() throws {
        let names = Fixture.all.map(\.file)
        #expect(Set(names).count == names.count)
        #expect(Fixture.good.count > 80 && Fixture.bad.count > 80)
        for fixture in Fixture.all {
            #expect(FileManager.default.fileExists(atPath: try fixture.path()), "\(fixture.file)")
        }
    }
}
