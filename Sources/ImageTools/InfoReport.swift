import DiskImage
import ImageFormats

/// What `info` tells of an image, for people and for programs.
///
/// Keys, words and their order are qemu-img's: programs read both forms.
public struct InfoReport: Sendable {
    private let facts: ImageFacts

    public init(_ facts: ImageFacts) { self.facts = facts }

    private var header: Qcow2Header? { facts.qcow2?.header }

    /// Whether there is a flag for "not closed properly"; an export behind a server has none.
    private var dirtyFlag: Bool? {
        facts.qcow2.map(\.isDirty) ?? (facts.isRemote ? nil : false)
    }

    // MARK: For programs

    public var json: JSONValue {
        var members: [JSONValue.Member] = []
        func add(_ key: String, _ value: JSONValue?) {
            if let value { members.append(.init(key, value)) }
        }
        add("backing-filename-format", header?.backingFile.flatMap { _ in backingFormat })
        if let snapshots = facts.qcow2?.snapshots, !snapshots.isEmpty {
            add("snapshots", .array(snapshots.map(Self.json)))
        }
        add("virtual-size", .integer(facts.virtualSize))
        add("filename", .string(facts.fileName))
        add("cluster-size", header.map { .integer($0.geometry.clusterSize) })
        add("format", .string(facts.format.rawValue))
        add("actual-size", facts.actualSize.map { .integer($0) })
        if let details {
            add(
                "format-specific",
                .object([
                    .init("type", .string(facts.format.rawValue)), .init("data", .object(details)),
                ]))
        }
        add("full-backing-filename", facts.fullBackingName.map { .string($0) })
        add("encrypted", facts.qcow2?.encryption.map { _ in .bool(true) })
        add("backing-filename", header?.backingFile.map { .string($0.description) })
        add("dirty-flag", dirtyFlag.map { .bool($0) })
        return .object(members)
    }

    private var backingFormat: JSONValue? {
        header?.backingFormat.flatMap { $0.isEmpty ? nil : .string($0) }
    }

    private static func json(_ snapshot: Qcow2Snapshot) -> JSONValue {
        let second: UInt64 = 1_000_000_000
        var members: [JSONValue.Member] = []
        if let count = snapshot.instructionCount {
            members.append(.init("icount", .integer(Int64(bitPattern: count))))
        }
        members += [
            .init("vm-clock-nsec", .integer(Int64(snapshot.guestNanoseconds % second))),
            .init("name", .string(snapshot.name.text)),
            .init("date-sec", .integer(Int64(snapshot.seconds))),
            .init("date-nsec", .integer(Int64(snapshot.nanoseconds))),
            .init("vm-clock-sec", .integer(Int64(snapshot.guestNanoseconds / second))),
            .init("id", .string(snapshot.id.text)),
            .init("vm-state-size", .integer(Int64(bitPattern: snapshot.stateSize))),
        ]
        return .object(members)
    }

    // MARK: What the format adds

    /// Members of the format's own part, for both forms; nil where the format has none.
    private var details: [JSONValue.Member]? {
        guard let image = facts.qcow2 else { return nil }
        let isModern = image.header.version >= 3
        var members: [JSONValue.Member] = [
            .init("compat", .string(isModern ? "1.1" : "0.10")),
            .init("compression-type", .string(image.header.compression.rawValue)),
        ]
        if isModern {
            members.append(.init("lazy-refcounts", .bool(image.hasLazyRefcounts)))
            if !image.bitmaps.isEmpty {
                members.append(.init("bitmaps", .array(image.bitmaps.map(Self.bitmap))))
            }
        }
        members.append(.init("refcount-bits", .integer(Int64(image.refcountBits))))
        if let encryption = image.encryption {
            members.append(.init("encrypt", .object(Self.encryption(encryption))))
        }
        guard isModern else { return members }
        if let file = image.dataFile { members.append(.init("data-file", .string(file))) }
        if let isRaw = image.dataFileIsRaw { members.append(.init("data-file-raw", .bool(isRaw))) }
        members.append(.init("corrupt", .bool(image.isCorrupt)))
        members.append(.init("extended-l2", .bool(image.header.geometry.hasExtendedL2)))
        return members
    }

    private static func bitmap(_ bitmap: Qcow2Bitmap) -> JSONValue {
        let flags = (bitmap.isInUse ? ["in-use"] : []) + (bitmap.isAuto ? ["auto"] : [])
        return .object([
            .init("flags", .array(flags.map { .string($0) })),
            .init("name", .string(bitmap.name)),
            .init("granularity", .integer(bitmap.granularity)),
        ])
    }

    private static func encryption(
        _ encryption: Qcow2Description.Encryption
    ) -> [JSONValue.Member] {
        guard case .luks(let luks) = encryption else { return [.init("format", .string("aes"))] }
        var members: [JSONValue.Member] = [
            .init("ivgen-alg", .string(luks.startValue)),
            .init("hash-alg", .string(luks.hash)),
            .init("cipher-alg", .string(luks.cipher)),
            .init("uuid", .string(luks.uuid)),
        ]
        if let hash = luks.startValueHash { members.append(.init("ivgen-hash-alg", .string(hash))) }
        return members + [
            .init("format", .string("luks")),
            .init("cipher-mode", .string(luks.mode)),
            .init("slots", .array(luks.slots.map(slot))),
            .init("payload-offset", .integer(luks.payloadOffset)),
            .init("master-key-iters", .integer(Int64(luks.masterKeyIterations))),
        ]
    }

    private static func slot(_ slot: LUKSHeader.KeySlot) -> JSONValue {
        guard let iterations = slot.iterations else {
            return .object([
                .init("active", .bool(false)), .init("key-offset", .integer(slot.keyOffset)),
            ])
        }
        return .object([
            .init("active", .bool(true)),
            .init("iters", .integer(Int64(iterations))),
            .init("key-offset", .integer(slot.keyOffset)),
            .init("stripes", .integer(Int64(slot.stripes))),
        ])
    }
}

extension InfoReport {
    // MARK: For people

    /// Lines, each with a line break. Names come from strangers: control characters are replaced.
    public var text: String {
        let size = facts.virtualSize
        var lines = [
            "image: \(facts.fileName)",
            "file format: \(facts.format.rawValue)",
            "virtual size: \(TextLayout.size(UInt64(size))) (\(size) bytes)",
            "disk size: "
                + (facts.actualSize.map { TextLayout.size(UInt64($0)) } ?? "unavailable"),
        ]
        if let image = facts.qcow2 {
            if image.encryption != nil { lines.append("encrypted: yes") }
            lines.append("cluster_size: \(image.header.geometry.clusterSize)")
            if image.isDirty { lines.append("cleanly shut down: no") }
            lines += backingLines(image.header)
            if !image.snapshots.isEmpty { lines += Self.table(image.snapshots) }
        }
        if let details {
            lines.append("Format specific information:")
            lines += Self.lines(details, indentation: "    ")
        }
        return lines.map { $0.withoutControlCharacters + "\n" }.joined()
    }

    private func backingLines(_ header: Qcow2Header) -> [String] {
        guard let name = header.backingFile else { return [] }
        var line = "backing file: \(name)"
        if let full = facts.fullBackingName {
            if full != name.description { line += " (actual path: \(full))" }
        } else {
            line += " (cannot determine actual path)"
        }
        guard let format = header.backingFormat, !format.isEmpty else { return [line] }
        return [line, "backing file format: \(format)"]
    }

    private static func table(_ snapshots: [Qcow2Snapshot]) -> [String] {
        ["Snapshot list:", row("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")]
            + snapshots.map { snapshot in
                let milliseconds = snapshot.guestNanoseconds / 1_000_000
                let seconds = milliseconds / 1000
                return row(
                    snapshot.id.text, snapshot.name.text, TextLayout.size(snapshot.stateSize),
                    TextLayout.localTime(snapshot.seconds),
                    TextLayout.format(
                        "%02llu:%02llu:%02llu.%03llu", seconds / 3600, seconds / 60 % 60,
                        seconds % 60, milliseconds % 1000),
                    snapshot.instructionCount.map { String(Int64(bitPattern: $0)) } ?? "")
            }
    }

    private static func row(
        _ id: String, _ name: String, _ size: String, _ date: String, _ clock: String,
        _ count: String
    ) -> String {
        TextLayout.padded(id, to: 9) + " " + TextLayout.padded(name, to: 16) + " "
            + TextLayout.padded(8, size) + TextLayout.padded(20, date)
            + TextLayout.padded(13, clock) + TextLayout.padded(11, count)
    }

    /// Keys with spaces for the hyphens, lists by numbers, each level four spaces further in.
    private static func lines(_ members: [JSONValue.Member], indentation: String) -> [String] {
        members.flatMap { member in
            lines(
                "\(indentation)\(member.key.replacing("-", with: " ")):", member.value,
                indentation + "    ")
        }
    }

    private static func lines(
        _ title: String, _ value: JSONValue, _ indentation: String
    ) -> [String] {
        switch value {
        case .object(let members): [title] + lines(members, indentation: indentation)
        case .array(let items):
            [title]
                + items.enumerated().flatMap { number, item in
                    lines("\(indentation)[\(number)]:", item, indentation + "    ")
                }
        case .string(let string): ["\(title) \(string)"]
        case .integer(let number): ["\(title) \(number)"]
        case .bool(let flag): ["\(title) \(flag)"]
        }
    }
}
