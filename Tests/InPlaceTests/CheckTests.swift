import Foundation
import TestSupport
import Testing

/// Images of every kind with every kind of damage: qemu-img and swimg report the same text.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct CheckTests {
    typealias Damage = @Sendable (Qcow2Patcher) throws -> Void

    /// Kinds of damage; one that an image cannot have throws or does nothing.
    static let damages: [(name: String, apply: Damage)] = [
        ("none", { _ in }),
        ("leaks", { for cluster in [1, 3, 4] { try $0.setRefcount(cluster, 2) } }),
        ("high leak", { try $0.setRefcount($0.fileSize / $0.clusterSize - 1, 5) }),
        ("refcount 0", { try $0.setRefcount(min(5, $0.fileSize / $0.clusterSize - 1), 0) }),
        ("double use", { try $0.setWord($0.l2Entry(1), $0.word($0.l2Entry(0))) }),
        ("data unaligned", { try $0.change($0.l2Entry(0)) { $0 + 512 } }),
        ("data beyond the end", { try $0.setWord($0.l2Entry(0), 1 << 63 | 1 << 44) }),
        ("L2 reserved high", { try $0.change($0.l2Entry(0)) { $0 | 1 << 57 } }),
        ("L2 reserved low", { try $0.change($0.l2Entry(0)) { $0 | 4 } }),
        ("zero cluster unaligned", { try $0.change($0.l2Entry(0)) { $0 | 513 } }),
        ("data not flagged", { try $0.change($0.l2Entry(0)) { $0 & ~(1 << 63) } }),
        ("compressed and flagged", { try $0.change($0.l2Entry(0)) { $0 | 3 << 62 } }),
        ("flagged without cluster", { try $0.setWord($0.l2Entry(0), 1 << 63) }),
        ("L1 beyond the end", { try $0.setWord($0.l1, 1 << 63 | 1 << 44) }),
        ("L1 reserved", { try $0.change($0.l1) { $0 | 1 << 57 } }),
        ("L1 not flagged", { try $0.change($0.l1) { $0 & ~(1 << 63) } }),
        ("L1 empty", { try $0.setWord($0.l1, 0) }),
        ("refcount block missing", { try $0.setWord($0.refcountTable, 0) }),
        (
            "refcount block twice",
            { try $0.setWord($0.refcountTable + 8, $0.word($0.refcountTable)) }
        ),
        (
            "refcount block is data",
            { try $0.setWord($0.refcountTable + 8, $0.word($0.l2Entry(0)) & ~(1 << 63)) }
        ),
        ("dirty", { if $0.version == 3 { try $0.change(72) { $0 | 1 } } }),
        ("corrupt", { if $0.version == 3 { try $0.change(72) { $0 | 2 } } }),
        ("file longer", { try $0.truncate(to: $0.fileSize + 3 * $0.clusterSize + 100) }),
        ("file shorter", { try $0.truncate(to: $0.fileSize - $0.clusterSize - 300) }),
        (
            "subclusters both",
            { if $0.hasExtendedL2 { try $0.setWord($0.l2Entry(0) + 8, 1 << 32 | 1) } }
        ),
        ("subclusters of nothing", { if $0.hasExtendedL2 { try $0.setWord($0.l2Entry(0), 0) } }),
    ]

    /// Damage that qemu-img cannot repair but swimg can.
    static let worseDamages: [(name: String, apply: Damage)] = [
        ("refcount table reserved bits", { try $0.change($0.refcountTable) { $0 | 1 } }),
        ("refcount block unaligned", { try $0.change($0.refcountTable) { $0 + 512 } }),
        ("refcount block outside", { try $0.setWord($0.refcountTable + 8, 1 << 40) }),
    ]

    /// Creation options of the images, followed by their other features.
    static let images = [
        "cluster_size=512,refcount_bits=1", "cluster_size=512", "refcount_bits=2",
        "refcount_bits=4", "refcount_bits=8 snapshots", "cluster_size=4k,refcount_bits=64",
        "refcount_bits=32 snapshots", "compat=0.10", "compat=0.10,cluster_size=4k snapshots",
        "extended_l2=on snapshots", "cluster_size=16k,extended_l2=on",
        "cluster_size=2M,refcount_bits=1", "cluster_size=4k snapshots",
        "cluster_size=64k snapshots",
        "preallocation=metadata", "cluster_size=4k,preallocation=falloc",
        "cluster_size=512 compressed", "cluster_size=4k compressed", "cluster_size=64k compressed",
        "cluster_size=64k bitmaps",
    ]

    private static func make(_ image: String, _ path: String) throws {
        let words = image.words
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", words[0], path, "4M")
        try Qemu.io(
            "qcow2", path,
            ["write -P 1 0 700k", "write -P 2 2M 64k", "write -P 3 3M 300k", "write -z 1M 128k"])
        switch words.dropFirst().first {
        case "snapshots":
            try Qemu.img("snapshot", "-c", "one", path)
            try Qemu.io("qcow2", path, ["write -P 9 100k 100k"])
            try Qemu.img("snapshot", "-c", "two", path)
            try Qemu.io("qcow2", path, ["write -P 8 3M 512k"])
        case "compressed":
            try Qemu.img("convert", "-c", "-O", "qcow2", "-o", words[0], path, path + ".new")
            try FileManager.default.removeItem(atPath: path)
            try FileManager.default.moveItem(atPath: path + ".new", toPath: path)
            try Qemu.io("qcow2", path, ["write -P 7 128k 200k"])
        case "bitmaps":
            try Qemu.img("bitmap", "--add", path, "one")
            try Qemu.io("qcow2", path, ["write -P 7 128k 200k"])
        default: break
        }
    }

    @Test(arguments: images)
    func saysAndRepairsAsQemu(_ image: String) throws {
        let folder = try TempFolder()
        try Self.make(image, folder.path("whole"))
        // Each image gets a sixth of the damages, which takes seconds instead of minutes.
        let turn = (Self.images.firstIndex(of: image) ?? 0) % 6
        for (number, damage) in Self.damages.enumerated() where number % 6 == turn {
            let path = try damaged(folder, damage.apply)
            let modes = ["", "--output=json", "-r leaks --output=json", "-r all"]
            for mode in modes {
                try expectSame(
                    ["check"] + mode.words, path, folder, "\(image), \(damage.name)")
            }
        }
    }

    @Test(arguments: images.filter { !$0.contains(" ") })
    func repairsWhatQemuCannot(_ image: String) throws {
        let folder = try TempFolder()
        try Self.make(image, folder.path("whole"))
        for damage in Self.worseDamages {
            let path = try damaged(folder, damage.apply)
            try expectSame(
                ["check", "--output=json"], path, folder, "\(image), \(damage.name)")
            let outcome = try run(Swimg.path, ["check", "-r", "all", path])
            #expect(outcome.status == 0, "\(image), \(damage.name): \(outcome)")
            let state = try Qemu.damage(path)
            #expect(state == nil, "\(image), \(damage.name): \(outcome)")
            let difference = try Qemu.difference(path, "qcow2", folder.path("whole"), "qcow2")
            #expect(difference == nil, "\(image), \(damage.name): \(outcome)")
        }
    }

    private func damaged(_ folder: TempFolder, _ damage: Damage) throws -> String {
        let path = folder.path("damaged")
        try? FileManager.default.removeItem(atPath: path)
        try FileManager.default.copyItem(atPath: folder.path("whole"), toPath: path)
        // Damage that an image cannot have (beyond its file) leaves it intact; that is checked too.
        try? damage(Qcow2Patcher(path))
        return path
    }

    /// Runs both programs on copies of the image with one name and compares status, output and
    /// errors; after a repair, qemu-img also compares the images.
    private func expectSame(
        _ words: [String], _ path: String, _ folder: TempFolder, _ what: String
    ) throws {
        var outcomes: [Outcome] = []
        for (program, own) in [("qemu-img", "theirs"), (Swimg.path, "ours")] {
            let place = try folder.makeFolder(own)
            try? FileManager.default.removeItem(atPath: "\(place)/image")
            try FileManager.default.copyItem(atPath: path, toPath: "\(place)/image")
            outcomes.append(try run(program, words + ["image"], in: place))
        }
        let (theirs, ours) = (outcomes[0], outcomes[1])
        #expect(theirs.status == ours.status, "\(what)\n\(theirs)\n\(ours)")
        #expect(theirs.outputText == ours.outputText, "\(what)\n\(theirs)\n\(ours)")
        let errors = ours.errorText.replacingOccurrences(of: Swimg.prefix, with: "qemu-img: ")
        #expect(theirs.errorText == errors, "\(what)\n\(theirs)\n\(ours)")
        guard words.contains("-r") else { return }
        let states = try ["theirs", "ours"].map {
            try run("qemu-img", ["check", folder.path("\($0)/image")]).status
        }
        #expect(states[0] == states[1], "\(what)\n\(ours)")
        let difference = try Qemu.difference(
            folder.path("theirs/image"), "qcow2", folder.path("ours/image"), "qcow2")
        guard let difference else { return }
        // qemu-img cannot compare an image that it cannot read.
        let itself = try Qemu.difference(
            folder.path("theirs/image"), "qcow2", folder.path("theirs/image"), "qcow2")
        #expect(itself != nil, "\(what): \(difference)\n\(ours)")
    }

    /// The repository's images, except those that qemu-img does not open without a backing file,
    /// data file or key that a check does not need.
    @Test func saysTheSameOfFixtures() throws {
        let others = ["bad-backing", "data-file", "encrypted-aes", "encrypted-luks"]
        for fixture in Fixture.all where fixture.file.hasSuffix(".qcow2") {
            guard !others.contains(where: fixture.file.contains) else { continue }
            let path = try fixture.path()
            let theirs = try run("qemu-img", ["check", "-f", "qcow2", "--output=json", path])
            let ours = try run(Swimg.path, ["check", "-f", "qcow2", "--output=json", path])
            #expect(theirs.status == ours.status, "\(theirs)\n\(ours)")
            #expect(theirs.outputText == ours.outputText, "\(theirs)\n\(ours)")
        }
    }

    @Test(arguments: [
        ("check raw", 63), ("check -f raw qcow2", 63), ("check -q raw", 63), ("check nosuch", 1),
        ("check", 1), ("check qcow2 qcow2", 1), ("check --output=xml qcow2", 1),
        ("check -r some qcow2", 1), ("check -f qcow2 raw", 1), ("check -T fast qcow2", 1),
        ("check -U -r all qcow2", 1), ("check qcow2 -q", 0), ("check -fqcow2 -Tnone qcow2", 0),
        ("check -q --output json -r all -U -f raw -f qcow2 -T unsafe nosuch", 1),
        ("check --force-share qcow2 --output=json", 0), ("check -q --output=json qcow2", 0),
    ])
    func commandLine(_ line: String, _ status: Int32) throws {
        let folder = try TempFolder()
        try Self.make("cluster_size=64k", folder.path("qcow2"))
        _ = try folder.write("raw", [UInt8](repeating: 0, count: 512))
        let theirs = try run("qemu-img", line.words, in: folder.path)
        let ours = try run(Swimg.path, line.words, in: folder.path)
        #expect(theirs.status == status && ours.status == status, "\(theirs)\n\(ours)")
        #expect(theirs.outputText == ours.outputText, "\(theirs)\n\(ours)")
        #expect(ours.errors.isEmpty == theirs.errors.isEmpty, "\(theirs)\n\(ours)")
    }

    /// A repair needs exclusive access to the image.
    @Test func repairTakesTheLocks() throws {
        let folder = try TempFolder()
        try Self.make("cluster_size=64k", folder.path("image"))
        let user = try RunningProcess(
            "qemu-io", ["-f", "qcow2", "-c", "sleep 20000", folder.path("image")])
        defer { user.kill() }
        #expect(user.wait(until: { user.hasOpen(folder.path("image")) }))
        usleep(200_000)
        for words in [["check", "-r", "all"], ["check"]] {
            let ours = try run(Swimg.path, words + [folder.path("image")])
            #expect(ours.status == 1 && ours.errorText.contains("lock"), "\(ours)")
        }
        let shared = try run(Swimg.path, ["check", "-U", folder.path("image")])
        #expect(shared.status == 0, "\(shared)")
    }
}
