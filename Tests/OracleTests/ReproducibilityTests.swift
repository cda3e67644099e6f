import Foundation
import TestSupport
import Testing

/// The README promises the same bytes for the same guest content and target options.
@Suite(.enabled(if: Qemu.isInstalled, "qemu-img makes the sources"))
struct ReproducibilityTests {
    static let modes = [
        "-m 1", "-m 3", "-m 8", "-m 64", "-m 1 -W", "-m 3 -W", "-m 8 -W", "-m 64 -W",
    ]

    @Test(arguments: some(6, of: TargetFormat.all))
    func sameBytesInEveryModeFromEverySource(_ target: TargetFormat) throws {
        let folder = try TempFolder()
        let path = folder.path("target")
        var first: (bytes: Data, outcome: Outcome)?
        for (number, name) in SourceGallery.names.enumerated() {
            let source = try SourceGallery.named(name)
            // Every mode for every seventh source, three modes for each other one.
            let modes =
                number % 7 == 0 ? Self.modes : (0..<3).map { Self.modes[(number + $0 * 3) % 8] }
            for mode in modes {
                let outcome = try Swimg.convert(
                    mode.words + ["-f", source.format]
                        + target.options + [source.path, path])
                #expect(outcome.isSuccess, "\(outcome)")
                guard outcome.isSuccess else { return }
                let bytes = try contents(path)
                if let first {
                    let difference = mismatch(first.bytes, bytes)
                    #expect(difference == nil, "between\n\(first.outcome)\n\(outcome)")
                    guard difference == nil else { return }
                } else {
                    first = (bytes, outcome)
                }
            }
        }
    }

    /// To provoke races: a larger disk, many runs, more coroutines than cores.
    @Test(arguments: [
        "-O qcow2 -o cluster_size=4k", "-c -O qcow2", "-c -O qcow2 -o cluster_size=4k",
    ])
    func sameBytesManyTimes(_ target: String) throws {
        let folder = try TempFolder()
        let letters = String(repeating: "A1-b0+C-2--3", count: 22)
        try DiskSketch(letters).writeRaw(folder.path("source"))
        let options = target.words
        var first: Data?
        for round in 0..<10 {
            let mode =
                round == 0 ? ["-m", "1"] : round % 2 == 0 ? ["-m", "16"] : ["-m", "16", "-W"]
            let outcome = try Swimg.convert(
                mode + ["-f", "raw"] + options + [folder.path("source"), folder.path("target")])
            #expect(outcome.isSuccess, "\(outcome)")
            let bytes = try contents(folder.path("target"))
            #expect(mismatch(first ?? bytes, bytes) == nil, "round \(round): \(outcome)")
            first = first ?? bytes
        }
    }

    /// Neither an old target's content nor the time of the conversion affects the bytes.
    @Test func sameBytesOverAnOldTarget() throws {
        let folder = try TempFolder()
        let line = ["-f", "raw", "-O", "qcow2", SourceGallery.reference]
        #expect(try Swimg.convert(line + [folder.path("new")]).isSuccess)
        try writeFilled(folder.path("old"), byte: 0xaa, count: 3_000_000)
        #expect(try Swimg.convert(line + [folder.path("old")]).isSuccess)
        #expect(try mismatch(contents(folder.path("new")), contents(folder.path("old"))) == nil)
    }
}
