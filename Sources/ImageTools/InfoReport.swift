import DiskImage
import ImageDrivers
import ImageFormats

/// The report of `swimg info` in a form for people and one for programs.
///
/// Keys, words and order are qemu-img's, because programs read both forms.
public struct InfoReport: Sendable {
    private let facts: ImageFacts

    public init(_ facts: ImageFacts) { self.facts = facts }

    private var details: FormatFacts { facts.details }

    // MARK: For programs

    public var json: JSONValue {
        var members: [JSONValue.Member] = []
        func add(_ key: String, _ value: JSONValue?) {
            if let value { members.append(.init(key, value)) }
        }
        add("children", .array(Self.children([facts.child].compactMap { $0 })))
        if details.backing != nil {
            add("backing-filename-format", backingFormat.map { .string($0) })
        }
        if !details.snapshots.isEmpty {
            add("snapshots", .array(details.snapshots.map(Self.json)))
        }
        add("virtual-size", .integer(details.virtualSize))
        add("filename", .string(facts.fileName))
        add("cluster-size", details.clusterSize.map { .integer($0) })
        add("format", .string(facts.formatName))
        add("actual-size", facts.actualSize.map { .integer($0) })
        if let members = details.details {
            add(
                "format-specific",
                .object([
                    .init("type", .string(facts.format.name)), .init("data", .object(members)),
                ]))
        }
        add("full-backing-filename", facts.fullBackingName.map { .string($0) })
        add("encrypted", details.isEncrypted ? .bool(true) : nil)
        add("backing-filename", details.backing.map { .string($0.name.description) })
        add("dirty-flag", details.isDirty.map { .bool($0) })
        return .object(members)
    }

    /// The nodes below the image, as QEMU 8 and later tell them. Programs find out by it whether an
    /// image consists of other files than the one they know.
    private static func children(_ nodes: [NodeFacts]) -> [JSONValue] {
        nodes.map { node in
            var members: [JSONValue.Member] = [
                .init("children", .array(children(node.children))),
                .init("virtual-size", .integer(node.size)),
                .init("filename", .string(node.fileName)),
                .init("format", .string(node.driver)),
            ]
            if let size = node.actualSize { members.append(.init("actual-size", .integer(size))) }
            if node.driver == "file" {
                members.append(
                    .init(
                        "format-specific",
                        .object([.init("type", .string("file")), .init("data", .object([]))])))
            }
            if node.isLocal { members.append(.init("dirty-flag", .bool(false))) }
            return .object([.init("name", .string("file")), .init("info", .object(members))])
        }
    }

    private var backingFormat: String? {
        details.backing?.format.flatMap { $0.isEmpty ? nil : $0 }
    }

    private static func json(_ snapshot: ImageSnapshot) -> JSONValue {
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
}

extension InfoReport {
    // MARK: For people

    /// Lines, each ending with a line break. Names are untrusted, so control characters are
    /// replaced.
    public var text: String {
        let size = details.virtualSize
        var lines = [
            "image: \(facts.fileName)",
            "file format: \(facts.formatName)",
            "virtual size: \(TextLayout.size(UInt64(size))) (\(size) bytes)",
            "disk size: "
                + (facts.actualSize.map { TextLayout.size(UInt64($0)) } ?? "unavailable"),
        ]
        if details.isEncrypted { lines.append("encrypted: yes") }
        if let clusterSize = details.clusterSize { lines.append("cluster_size: \(clusterSize)") }
        if details.isDirty == true { lines.append("cleanly shut down: no") }
        lines += backingLines
        if !details.snapshots.isEmpty { lines += Self.table(details.snapshots) }
        if let members = details.details {
            lines.append("Format specific information:")
            lines += Self.lines(members, indentation: "    ")
        }
        return lines.map { $0.withoutControlCharacters + "\n" }.joined()
    }

    /// The table of snapshots; empty if there are none.
    public var snapshotText: String {
        guard !details.snapshots.isEmpty else { return "" }
        return Self.table(details.snapshots).map { $0.withoutControlCharacters + "\n" }.joined()
    }

    private var backingLines: [String] {
        guard let name = details.backing?.name else { return [] }
        var line = "backing file: \(name)"
        if let full = facts.fullBackingName {
            if full != name.description { line += " (actual path: \(full))" }
        } else {
            line += " (cannot determine actual path)"
        }
        guard let backingFormat else { return [line] }
        return [line, "backing file format: \(backingFormat)"]
    }

    private static func table(_ snapshots: [ImageSnapshot]) -> [String] {
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

    /// Prints keys with spaces instead of hyphens, list items by index, and each level indented by
    /// four more spaces.
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
        case .null: ["\(title) null"]
        case .string(let string): ["\(title) \(string)"]
        case .integer(let number): ["\(title) \(number)"]
        case .bool(let flag): ["\(title) \(flag)"]
        }
    }
}
