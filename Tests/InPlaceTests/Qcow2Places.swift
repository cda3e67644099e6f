import TestSupport

/// The meaningful fields of a sound qcow2 image, located according to the specification.
struct Qcow2Places {
    enum Kind {
        case number, flags, offset, entry, descriptor, subclusters, name
    }

    struct Place {
        let what: String
        let offset: Int
        let width: Int
        let kind: Kind
    }

    let clusterBits: Int
    var clusterSize: Int { 1 << clusterBits }
    /// Groups of places of one sort; none is empty.
    private(set) var groups: [[Place]] = []
    /// Offsets of structures in the file, as values for offset fields.
    private(set) var structures = [0]
    private let image: [UInt8]

    private static let offsetMask: UInt64 = 0x00ff_ffff_ffff_fe00

    init(_ image: [UInt8]) {
        self.image = image
        clusterBits = Int(image.number(20, 4))
        structures += [40, 48, 64].map { Int(image.number($0, 8)) }
        addHeader()
        addExtensions()
        addTables(at: Int(image.number(40, 8)), count: Int(image.number(36, 4)), of: "")
        addRefcounts()
        addSnapshots()
        groups.removeAll { $0.isEmpty }
    }

    private var version: UInt64 { image.number(4, 4) }
    private var hasExtendedL2: Bool { version >= 3 && image.number(72, 8) & 16 != 0 }

    private mutating func addHeader() {
        let numbers = [
            ("magic", 0, 4), ("version", 4, 4), ("backing file name's length", 16, 4),
            ("cluster bits", 20, 4), ("disk size", 24, 8), ("encryption", 32, 4),
            ("L1 size", 36, 4), ("refcount table clusters", 56, 4), ("snapshots", 60, 4),
        ]
        let offsets = [
            ("backing file name's offset", 8), ("L1 offset", 40), ("refcount table offset", 48),
            ("snapshot table offset", 64),
        ]
        var places = numbers.map { Place(what: $0, offset: $1, width: $2, kind: .number) }
        // The disk's size affects the most code and has edge cases of its own, so it is picked more
        // often.
        places += Array(repeating: places[4], count: 3)
        places += offsets.map { Place(what: $0, offset: $1, width: 8, kind: .offset) }
        if version >= 3 {
            let features = ["incompatible", "compatible", "autoclear"].enumerated()
            places += features.map {
                Place(what: "\($1) features", offset: 72 + 8 * $0, width: 8, kind: .flags)
            }
            places += [
                Place(what: "refcount order", offset: 96, width: 4, kind: .number),
                Place(what: "header length", offset: 100, width: 4, kind: .number),
                Place(what: "compression type", offset: 104, width: 1, kind: .number),
            ]
        }
        groups.append(places)
        let name = Int(image.number(8, 8))
        let length = Int(image.number(16, 4))
        guard name > 0, length > 0 else { return }
        groups.append([Place(what: "backing file name", offset: name, width: length, kind: .name)])
    }

    private mutating func addExtensions() {
        var places: [Place] = []
        var bitmaps: [Place] = []
        var at = version >= 3 ? Int(image.number(100, 4)) : 72
        while at + 8 <= clusterSize {
            let type = image.number(at, 4)
            let length = Int(image.number(at + 4, 4))
            places.append(Place(what: "extension type", offset: at, width: 4, kind: .number))
            places.append(Place(what: "extension length", offset: at + 4, width: 4, kind: .number))
            if type == 0 { break }
            if type == 0x2385_2875 { bitmaps = bitmapPlaces(at + 8) }
            if length > 0 {
                places.append(Place(what: "extension", offset: at + 8, width: 1, kind: .number))
            }
            at += 8 + (length + 7) / 8 * 8
        }
        groups.append(places)
        groups.append(bitmaps)
    }

    private mutating func bitmapPlaces(_ at: Int) -> [Place] {
        let directory = Int(image.number(at + 16, 8))
        structures.append(directory)
        let table = Int(image.number(directory, 8))
        structures.append(table)
        return [
            Place(what: "bitmaps", offset: at, width: 4, kind: .number),
            Place(what: "bitmap directory size", offset: at + 8, width: 8, kind: .number),
            Place(what: "bitmap directory offset", offset: at + 16, width: 8, kind: .offset),
            Place(what: "bitmap table offset", offset: directory, width: 8, kind: .offset),
            Place(what: "bitmap table size", offset: directory + 8, width: 4, kind: .number),
            Place(what: "bitmap flags", offset: directory + 12, width: 4, kind: .number),
            Place(what: "bitmap type", offset: directory + 16, width: 1, kind: .number),
            Place(what: "bitmap granularity", offset: directory + 17, width: 1, kind: .number),
            Place(what: "bitmap name size", offset: directory + 18, width: 2, kind: .number),
            Place(what: "bitmap extra size", offset: directory + 20, width: 4, kind: .number),
            Place(what: "bitmap name", offset: directory + 24, width: 1, kind: .number),
            Place(what: "bitmap table entry", offset: table, width: 8, kind: .entry),
        ]
    }

    /// Adds the entries of an L1 table and of the L2 tables that it names.
    private mutating func addTables(at l1: Int, count: Int, of owner: String) {
        var entries: [Place] = []
        var data: [Place] = []
        var empty: [Place] = []
        var compressed: [Place] = []
        var subclusters: [Place] = []
        let width = hasExtendedL2 ? 16 : 8
        for index in 0..<count {
            let at = l1 + 8 * index
            entries.append(
                Place(what: "L1 entry \(index)\(owner)", offset: at, width: 8, kind: .entry))
            let table = Int(image.number(at, 8) & Self.offsetMask)
            guard table > 0 else { continue }
            structures.append(table)
            for slot in 0..<clusterSize / width {
                let at = table + slot * width
                guard at + width <= image.count else { break }
                let value = image.number(at, 8)
                let what = "L2 entry \(slot) of L1 entry \(index)\(owner)"
                if value == 0 {
                    empty.append(Place(what: what, offset: at, width: 8, kind: .entry))
                } else if value & 1 << 62 != 0 {
                    compressed.append(Place(what: what, offset: at, width: 8, kind: .descriptor))
                    let stream = Int(value & (1 << (70 - UInt64(clusterBits)) - 1))
                    structures.append(stream)
                    compressed.append(
                        Place(what: "compressed data", offset: stream, width: 1, kind: .number))
                } else {
                    data.append(Place(what: what, offset: at, width: 8, kind: .entry))
                    structures.append(Int(value & Self.offsetMask))
                }
                if hasExtendedL2 {
                    subclusters.append(
                        Place(
                            what: "subclusters of \(what)", offset: at + 8, width: 8,
                            kind: .subclusters))
                }
            }
        }
        groups += [entries, data, Array(empty.prefix(64) + empty.suffix(16)), compressed]
        groups.append(subclusters)
    }

    private mutating func addRefcounts() {
        let table = Int(image.number(48, 8))
        let bits = version >= 3 ? 1 << Int(image.number(96, 4)) : 16
        var entries: [Place] = []
        var counts: [Place] = []
        for index in 0..<Int(image.number(56, 4)) * clusterSize / 8 {
            let at = table + 8 * index
            guard at + 8 <= image.count else { break }
            let block = Int(image.number(at, 8))
            // Includes only the first empty entries and the first cluster's last one.
            guard block > 0 || index < 8 || index == clusterSize / 8 - 1 else { continue }
            entries.append(
                Place(what: "refcount table entry \(index)", offset: at, width: 8, kind: .offset))
            guard block > 0, block + clusterSize <= image.count else { continue }
            structures.append(block)
            let width = max(1, bits / 8)
            let used = min(clusterSize, (image.count / clusterSize + 8) * bits / 8 + 1)
            for at in stride(from: 0, to: used - width + 1, by: width) {
                counts.append(
                    Place(
                        what: "refcounts (entry \(index))", offset: block + at, width: width,
                        kind: .number))
            }
        }
        groups += [entries, counts]
    }

    private mutating func addSnapshots() {
        var at = Int(image.number(64, 8))
        var places: [Place] = []
        for index in 0..<Int(image.number(60, 4)) {
            let of = " of snapshot \(index)"
            let l1 = Int(image.number(at, 8))
            structures.append(l1)
            let id = Int(image.number(at + 12, 2))
            let name = Int(image.number(at + 14, 2))
            let extra = Int(image.number(at + 36, 4))
            places += [
                Place(what: "L1 offset" + of, offset: at, width: 8, kind: .offset),
                Place(what: "L1 size" + of, offset: at + 8, width: 4, kind: .number),
                Place(what: "id length" + of, offset: at + 12, width: 2, kind: .number),
                Place(what: "name length" + of, offset: at + 14, width: 2, kind: .number),
                Place(what: "VM state size" + of, offset: at + 32, width: 4, kind: .number),
                Place(what: "extra size" + of, offset: at + 36, width: 4, kind: .number),
                Place(what: "extra VM state size" + of, offset: at + 40, width: 8, kind: .number),
                Place(what: "disk size" + of, offset: at + 48, width: 8, kind: .number),
                Place(what: "id" + of, offset: at + 40 + extra, width: id, kind: .name),
                Place(what: "name" + of, offset: at + 40 + extra + id, width: name, kind: .name),
            ]
            addTables(at: l1, count: Int(image.number(at + 8, 4)), of: of)
            at += (40 + extra + id + name + 7) / 8 * 8
        }
        groups.append(places)
    }
}
