import Foundation
import TestSupport

/// One mutated image and the results of the verbs on copies.
struct MutationTrial {
    private(set) var complaints: [String] = []
    private let seed: UInt64
    private let source: MutationImage
    private let mutator: Qcow2Mutator
    private let folder: TempFolder
    private var random: SplitMix64

    /// Seconds after which a program counts as hanging.
    private static let patience = 20.0
    /// The largest disk, in bytes, whose content is compared.
    private static let largestDisk = 64 << 20

    init(seed: UInt64, images: [MutationImage]) throws {
        self.seed = seed
        random = SplitMix64(seed: seed)
        source = random.pick(images)
        var mutator = Qcow2Mutator(source.bytes, ownName: "image", seed: random.next())
        for _ in 0...random.below(3) { mutator.mutate() }
        self.mutator = mutator
        folder = try TempFolder()
        _ = try folder.write("image", mutator.bytes)
        if let backing = source.backing { _ = try folder.write("below", backing) }
    }

    var story: String {
        (["SWIMG_SEED=\(seed) SWIMG_MUTATIONS=1 makes this image:", source.name] + mutator.story)
            .joined(separator: "\n")
    }

    mutating func complain(_ what: String) { complaints.append(what) }

    /// The disk and the snapshots that were readable before the change.
    private struct Disk {
        var own: Data?
        var theirs: Data?
        var snapshots: [Data?] = []
    }

    mutating func run() throws {
        let before = try read()
        try look()
        for way in Way.some(&random) { try change(way, before) }
    }

    // MARK: Reading

    /// The disk's size according to the header; 0 without a header.
    private var size: Int {
        mutator.bytes.count < 32 ? 0 : Int(clamping: mutator.bytes.number(24, 8))
    }

    private mutating func read() throws -> Disk {
        guard size <= Self.largestDisk else { return Disk() }
        var disk = Disk()
        disk.own = try ownContent("image")
        disk.theirs = try theirContent("image")
        if let own = disk.own, let theirs = disk.theirs, let difference = difference(theirs, own) {
            complain("the content differs from qemu-img's: \(difference)")
        }
        for number in 0..<source.snapshots {
            disk.snapshots.append(try ownContent("image", snapshot: number + 1))
        }
        return disk
    }

    /// The disk as swimg reads it; nil if swimg fails.
    private mutating func ownContent(_ name: String, snapshot: Int? = nil) throws -> Data? {
        let outcome = try own(conversion(name, snapshot))
        let exists = FileStatus(folder.path("disk")) != nil
        if exists != outcome.isSuccess { complain("a target, or none, after \(outcome)") }
        guard outcome.isSuccess else { return nil }
        return try takeDisk()
    }

    private func theirContent(_ name: String, snapshot: Int? = nil) throws -> Data? {
        guard let outcome = theirs(conversion(name, snapshot)), outcome.isSuccess else {
            return nil
        }
        return try takeDisk()
    }

    private func conversion(_ name: String, _ snapshot: Int?) -> [String] {
        try? FileManager.default.removeItem(atPath: folder.path("disk"))
        let part = snapshot.map { ["-l", "snapshot.id=\($0)"] } ?? []
        return ["convert", "-f", "qcow2", "-O", "raw"] + part + [name, "disk"]
    }

    private func takeDisk() throws -> Data {
        let disk = try contents(folder.path("disk"))
        try FileManager.default.removeItem(atPath: folder.path("disk"))
        return disk
    }

    /// Runs one more verb that only reads.
    private mutating func look() throws {
        let verbs = [
            "info", "info --output=json", "map", "map --output=json", "check",
            "check --output=json", "digest", "compare -F raw", "compare -s", "measure -O qcow2",
        ]
        let line = random.pick(verbs).words
        let isLarge = size > Self.largestDisk
        if isLarge, ["digest", "compare"].contains(line[0]) { return }
        if line.contains("raw") { _ = try folder.write("disk", []) }
        let other = line[0] == "compare" ? [line.contains("raw") ? "disk" : "image"] : []
        _ = try own(line + ["-f", "qcow2", "image"] + other)
    }

    // MARK: Changing

    private mutating func change(_ way: Way, _ before: Disk) throws {
        if size > Self.largestDisk, way == .growPreallocated { return }
        let copy = folder.path("copy")
        _ = try folder.write("copy", mutator.bytes)
        let old = theirCheck("copy")
        let outcome = try own(way.line(size))
        let bytes = [UInt8](try contents(copy))
        let story = "\(outcome)"
        // A check that finds errors, repaired or not, has not failed.
        guard outcome.isSuccess || way.isRepair && outcome.status != 1 else {
            if let difference = mismatch(bytes, mutator.bytes) {
                complain("changed by a failure: \(difference)\n\(story)")
            }
            return
        }
        if let new = theirCheck("copy") {
            judge(new, after: old, way, outcome)
        }
        guard size <= Self.largestDisk else { return }
        try expectSame(before, way, story)
    }

    private func theirCheck(_ name: String) -> Outcome? {
        theirs(["check", "-f", "qcow2", name])
    }

    private mutating func judge(
        _ new: Outcome, after old: Outcome?, _ way: Way, _ outcome: Outcome
    ) {
        // A repair must not increase the number of errors, except flags that were right while a
        // refcount was wrong: they stay in tables that must not be written ("a table that is data
        // as well"). `-r leaks` leaves such flags in all tables, as qemu-img does.
        if way == .repairAll, let old, let before = Self.errors(old), let after = Self.errors(new),
            after > before
        {
            complain("\(after) errors after \(before):\n\(outcome)\n\(new)\nbefore\n\(old)")
        }
        if Self.mayEnd(new.status, old?.status, way, outcome) { return }
        complain(
            "qemu-img check differs after\n\(outcome)\n\(new)\nbefore\n\(old?.description ?? "")")
    }

    /// The number of errors of a check except flag errors; nil if the check failed.
    private static func errors(_ check: Outcome) -> Int? {
        guard check.status != 1 else { return nil }
        return check.errorText.split(separator: "\n").count {
            $0.hasPrefix("ERROR") && !$0.hasPrefix("ERROR OFLAG_COPIED")
        }
    }

    private mutating func expectSame(_ before: Disk, _ way: Way, _ story: String) throws {
        if let own = before.own {
            let after = try before.theirs == nil ? ownContent("copy") : theirContent("copy")
            if let difference = difference(after, way.expected(own, size)) {
                complain("the disk: \(difference)\n\(story)")
            }
        }
        for (number, disk) in before.snapshots.enumerated() {
            guard let disk else { continue }
            let after = try ownContent("copy", snapshot: number + 1)
            // A snapshot is shown with the current size of the disk. Its content after the old end
            // is its own, because the disk may have been larger at the time. An entry there may be
            // one that only qemu-img reads ("reserved bits in L1 and L2 entries").
            let known = min(size, way.expected(disk, size).count)
            let now =
                try after == nil && size < way.newSize(size)
                ? theirContent("copy", snapshot: number + 1) : after
            if let difference = difference(now?.prefix(known), disk.prefix(known)) {
                complain("snapshot \(number + 1): \(difference)\n\(story)")
            }
        }
    }

    // MARK: Known differences (docs/differences.md)

    /// Whether `qemu-img check` may exit with this status after a successful change.
    private static func mayEnd(
        _ new: Int32, _ old: Int32?, _ way: Way, _ outcome: Outcome
    ) -> Bool {
        // "check and the backing file", "damaged bitmaps": an image that qemu-img could not open
        // before the change need not be readable afterwards.
        if old == 1, new == 1 { return true }
        if way.isRepair { return new == outcome.status }
        // "resize of an image with errors": leaks are not errors and may stay.
        return new == 0 || old == 3 && new == 3
    }

    private func difference(_ disk: Data?, _ expected: Data) -> String? {
        guard let disk else { return "cannot be read any more" }
        // "a qcow2 disk whose size is no multiple of 512": qemu-img cuts the end off, swimg pads
        // it.
        let isCut = size % 512 != 0 && disk.count == expected.count - 512
        return mismatch(disk, isCut ? expected.dropLast(512) : expected)
    }

    /// "a backing chain that leads back into itself": qemu-img would exhaust the memory.
    private var mayAskQemu: Bool { !mutator.isLoop }

    // MARK: Programs

    /// Runs swimg and checks everything that does not depend on the command.
    private mutating func own(_ words: [String]) throws -> Outcome {
        let outcome = try TestSupport.run(
            Swimg.path, words, in: folder.path, timeout: Self.patience)
        if outcome.status >= 128 { complain("ended by a signal: \(outcome)") }
        let text = outcome.errorText
        let isCheck = words[0] == "check"
        let failed = isCheck ? outcome.status == 1 : outcome.status != 0
        // Differing contents are a result, not a failure.
        let isAnswer = words[0] == "compare" && outcome.status == 1
        let lines = text.split(separator: "\n", omittingEmptySubsequences: false)
        if failed && !isAnswer {
            // A check also prints its findings to standard error.
            let said = isCheck ? lines.suffix(2) : lines[...]
            if said.count != 2 || !said[said.startIndex].hasPrefix(Swimg.prefix)
                || said.last != ""
            {
                complain("not one line: \(outcome)")
            }
        } else if !isCheck && !text.isEmpty {
            complain("a success that complains: \(outcome)")
        }
        if outcome.errors.contains(where: { $0 < 32 && $0 != UInt8(ascii: "\n") }) {
            complain("control characters: \(outcome)")
        }
        let sources = [("image", mutator.bytes), ("below", source.backing ?? [])]
        for (name, bytes) in sources where name == "image" || source.backing != nil {
            if let difference = try mismatch(contents(folder.path(name)), bytes) {
                complain("\(name) was changed: \(difference) by \(outcome)")
            }
        }
        return outcome
    }

    /// Runs qemu-img; nil if it crashes, hangs or must not be asked.
    private func theirs(_ words: [String]) -> Outcome? {
        guard mayAskQemu else { return nil }
        let outcome = try? TestSupport.run(
            "qemu-img", words, in: folder.path, timeout: Self.patience)
        return outcome.flatMap { $0.status < 128 ? $0 : nil }
    }
}

/// A way to change an image in place.
enum Way: CaseIterable {
    case repairLeaks, repairAll, grow, growPreallocated, shrink

    /// Two ways: trying all for each image would cost more time than it finds errors.
    static func some(_ random: inout SplitMix64) -> [Way] {
        Array(allCases.shuffled(using: &random).prefix(2))
    }

    var isRepair: Bool { self == .repairLeaks || self == .repairAll }

    func newSize(_ size: Int) -> Int {
        self == .shrink ? size / 3 / 512 * 512 : (size + 300_000) / 512 * 512
    }

    func line(_ size: Int) -> [String] {
        let new = "\(newSize(min(size, 1 << 60)))"
        return switch self {
        case .repairLeaks: ["check", "-r", "leaks", "-f", "qcow2", "copy"]
        case .repairAll: ["check", "-r", "all", "-f", "qcow2", "copy"]
        case .grow: ["resize", "-q", "-f", "qcow2", "copy", new]
        case .growPreallocated:
            ["resize", "-q", "-f", "qcow2", "--preallocation=metadata", "copy", new]
        case .shrink: ["resize", "-q", "-f", "qcow2", "--shrink", "copy", new]
        }
    }

    /// The expected content of the disk after the change.
    func expected(_ disk: Data, _ size: Int) -> Data {
        guard !isRepair else { return disk }
        let new = newSize(size)
        return disk.prefix(new) + Data(count: max(0, new - disk.count))
    }
}
