import Foundation
import TestSupport
import Testing

/// Lists of snapshots of old programs, and damaged ones, as in QEMU's own test 261.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct SnapshotTableTests {
    private let folder: TempFolder

    init() throws { folder = try TempFolder() }

    /// An image with three snapshots that differ, whose entries get extra data of these lengths in
    /// bytes.
    private func make(_ options: String = "compat=0.10", extra: [Int] = [0, 50, 8]) throws {
        let image = folder.path("image")
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", options, image, "1M")
        for number in 0..<3 {
            try Qemu.io("qcow2", image, ["write -P \(number + 1) \(number * 200)k 300k"])
            try Qemu.img("snapshot", "-c", "sn\(number)", image)
        }
        var entries = try entries(folder)
        for (number, length) in extra.enumerated() {
            var data = entries[number].extra.prefix(length)
            data += Array("very important data".utf8.prefix(max(0, length - data.count)))
            entries[number].extra = data + [UInt8](repeating: 0, count: length - data.count)
        }
        try write(entries)
    }

    private struct Entry: Equatable {
        /// The first 40 bytes but the length of the extra data, which is at their end.
        var fixed: [UInt8]
        var extra: [UInt8]
        var names: [UInt8]

        var length: Int { 40 + extra.count + names.count }
        var diskSize: UInt64? { extra.count < 16 ? nil : number(extra[8..<16]) }
    }

    private func entries(_ folder: TempFolder) throws -> [Entry] {
        let bytes = try [UInt8](contents(folder.path("image")))
        var position = Int(number(bytes[64..<72]))
        return (0..<number(bytes[60..<64])).map { _ in
            position = (position + 7) / 8 * 8
            let fixed = Array(bytes[position..<position + 36])
            let extra = Int(number(bytes[position + 36..<position + 40]))
            let start = position + 40
            let names = Int(number(fixed[12..<14]) + number(fixed[14..<16]))
            position = start + extra + names
            return Entry(
                fixed: fixed, extra: Array(bytes[start..<start + extra]),
                names: Array(bytes[start + extra..<position]))
        }
    }

    /// Writes entries where the list stands.
    private func write(_ entries: [Entry]) throws {
        var bytes: [UInt8] = []
        for entry in entries {
            bytes += [UInt8](repeating: 0, count: (8 - bytes.count % 8) % 8)
            bytes += entry.fixed + big(UInt32(entry.extra.count)) + entry.extra + entry.names
        }
        try patcher().write(bytes, at: listOffset())
    }

    private func patcher() throws -> Qcow2Patcher { try Qcow2Patcher(folder.path("image")) }

    private func listOffset() throws -> Int {
        Int(number(try contents(folder.path("image"), at: 64, count: 8)[...]))
    }

    /// The content of the disk and of all snapshots.
    private func disks(_ folder: TempFolder) throws -> [Data] {
        try [[], ["-l", "sn0"], ["-l", "sn1"], ["-l", "sn2"]].map {
            let line = ["convert", "-U"] + $0 + ["-f", "qcow2", "-O", "raw", "image", "disk"]
            try require("qemu-img", line, in: folder.path)
            defer { try? FileManager.default.removeItem(atPath: folder.path("disk")) }
            return try contents(folder.path("disk"))
        }
    }

    /// Makes the header say that it is of version 3, which asks for more in each entry.
    private func pretendVersion3() throws {
        try patcher().write([3], at: 7)
        try patcher().write(big(UInt32(4)) + big(UInt32(104)), at: 96)
    }

    // MARK: Lists that lack facts

    @Test(arguments: ["compat=1.1", "compat=1.1,refcount_bits=8", "compat=1.1,size=2M"])
    func upgrades(_ way: String) throws {
        try make()
        let (before, disks) = try (entries(folder), disks(folder))
        let twins = try Twins(copying: folder)
        // qemu-img 7.2 resizes afterwards, as swimg does.
        let outcome = try twins.run(["amend", "-o", way, "image"])
        try twins.expectSame("image", "qcow2", "\(outcome)")
        // qemu-img shows snapshots in the size of the disk.
        #expect(try self.disks(folder).map { $0.prefix(1 << 20) } == disks, "\(outcome)")
        let (own, theirs) = try (entries(twins.own), entries(twins.theirs))
        #expect(own.map(\.extra.count) == [24, 50, 24] && own[1] == before[1], "\(outcome)")
        #expect(own.map(\.names) == theirs.map(\.names))
        #expect(own.map(\.diskSize) == theirs.map(\.diskSize))
        #expect(own.map(\.extra) == theirs.map(\.extra), "\(outcome)")
    }

    @Test(arguments: [false, true])
    func repairsMissingFacts(_ hasBitmap: Bool) throws {
        if hasBitmap {
            try make("compat=1.1")
            // qemu-img opens no such image to add one.
            let good = try entries(folder)
            try write(good.map { Entry(fixed: $0.fixed, extra: [], names: $0.names) })
            try require(Swimg.path, ["check", "-r", "all", "image"], in: folder.path)
            try Qemu.img("bitmap", "--add", "image", "b", in: folder.path)
            try write(entries(folder).map { Entry(fixed: $0.fixed, extra: [], names: $0.names) })
        } else {
            try make()
            try pretendVersion3()
        }
        let disks = try disks(folder)
        let twins = try Twins(copying: folder)
        let theirs = try run("qemu-img", ["check", "-r", "all", "image"], in: twins.theirs.path)
        let ours = try run(Swimg.path, ["check", "-r", "all", "image"], in: folder.path)
        #expect(ours.status == 0, "\(ours)")
        let lines = hasBitmap ? [0, 1, 2] : [0, 2]
        for line in lines {
            #expect(
                ours.description.contains("Repairing snapshot table entry \(line) is incomplete"))
        }
        #expect(try Qemu.damage(folder.path("image")) == nil, "\(ours)")
        #expect(try self.disks(folder) == disks, "\(ours)")
        #expect(try entries(folder).allSatisfy { $0.diskSize == 1 << 20 })
        guard hasBitmap else {
            #expect(ours.status == theirs.status && counts(ours) == counts(theirs))
            #expect(try entries(folder).map(\.extra.count) == [24, 50, 24], "\(ours)")
            return
        }
        #expect(try Qemu.img("info", folder.path("image")).contains("name: b"))
    }

    /// The counts of a check, without the end of the file, which is free.
    private func counts(_ outcome: Outcome) -> [Substring] {
        outcome.outputText.split(separator: "\n").filter { !$0.hasPrefix("Image end") }
    }

    // MARK: Lists that no program opens

    /// Extra data that is said to be long; its entry is the last one, so its names are lost.
    @Test func tooMuchExtraData() throws {
        try make("compat=1.1", extra: [])
        var position = try listOffset()
        for entry in try entries(folder).dropLast() {
            position += (entry.length + 7) / 8 * 8
        }
        try patcher().write(big(UInt32(65536)), at: position + 36)
        let twins = try Twins(copying: folder)
        for line in ["check image", "info image", "check -r all image", "check image"] {
            let outcome = try run(Swimg.path, line.words, in: folder.path)
            let other = try run("qemu-img", line.words, in: twins.theirs.path)
            #expect(outcome.status == other.status, "\(outcome)\n\(other)")
        }
        #expect(try Qemu.damage(folder.path("image")) == nil)
        let (own, theirs) = try (entries(twins.own), entries(twins.theirs))
        #expect(own.map(\.extra.count) == theirs.map(\.extra.count))
        #expect(own.prefix(2) == theirs.prefix(2))
    }

    /// qemu-img takes what it finds behind such an entry for snapshots, and loses those that were
    /// there.
    @Test(arguments: [65536, 1 << 30] as [UInt32])
    func entriesThatCannotBeFoundAreNotGivenUp(_ length: UInt32) throws {
        try make("compat=1.1", extra: [])
        try patcher().write(big(length), at: listOffset() + 36)
        let before = try contents(folder.path("image"))
        let outcome = try run(Swimg.path, ["check", "-r", "all", "image"], in: folder.path)
        #expect(outcome.status == 1 && outcome.description.contains("cannot be read"))
        #expect(try contents(folder.path("image")) == before)
        try patcher().write(big(UInt32(24)), at: listOffset() + 36)
        #expect(try Qemu.damage(folder.path("image")) == nil)
    }

    /// The table of refcounts has room for the list; the file is sparse.
    @Test func tooManySnapshots() throws {
        let image = folder.path("image")
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", image, "64M")
        try Qemu.io("qcow2", image, ["write -P 1 0 64k"])
        try patcher().write(big(UInt32(131_072)) + big(UInt64(1 << 20)), at: 60)
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: image))
        try file.truncate(atOffset: UInt64(1 << 20 + 40 * 131_072))
        try file.close()
        let outcome = try run(Swimg.path, ["check", "-r", "all", image])
        #expect(
            outcome.isSuccess
                && outcome.description.contains("Discarding 65536 overhanging snapshots"))
        #expect(try Qemu.damage(image) == nil)
        #expect(try contents(image, at: 60, count: 4) == big(UInt32(65536)))
    }

    // MARK: Crashes

    /// A repair that fails or is killed at any write leaves an image that can be repaired, with all
    /// of its snapshots.
    @Test(.enabled(if: canTraceSystemCalls, "strace ends it at a certain write"))
    func repairKilledAnywhere() throws {
        try make()
        try pretendVersion3()
        let disks = try disks(folder)
        try disturb(["check", "-r", "all", "image"], in: folder, at: 1...8) { copy, outcome in
            let check = try run("qemu-img", ["check", "-r", "all", "image"], in: copy.path)
            #expect(check.isSuccess, "\(outcome)\n\(check)")
            #expect(try self.disks(copy) == disks, "\(outcome)")
        }
    }

    @Test(.enabled(if: canTraceSystemCalls, "strace ends it at a certain write"))
    func upgradeKilledAnywhere() throws {
        try make()
        let disks = try disks(folder)
        try disturb(["amend", "-o", "compat=1.1", "image"], in: folder, at: 1...8) {
            copy, outcome in
            let errors = try Qemu.errors("image", in: copy.path)
            #expect(errors == nil, "\(outcome)")
            #expect(try self.disks(copy) == disks, "\(outcome)")
        }
    }
}

private func number(_ bytes: ArraySlice<UInt8>) -> UInt64 {
    bytes.reduce(0) { $0 << 8 | UInt64($1) }
}

private func big(_ number: some FixedWidthInteger) -> [UInt8] {
    withUnsafeBytes(of: number.bigEndian) { Array($0) }
}
