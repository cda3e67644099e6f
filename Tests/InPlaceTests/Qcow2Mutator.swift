import Foundation
import TestSupport

/// Changes a qcow2 image in memory at meaningful fields, based on the specification instead of the
/// code under test. The seed determines the changes to an image.
struct Qcow2Mutator {
    private(set) var bytes: [UInt8]
    /// The changes, one line each.
    private(set) var story: [String] = []
    /// Whether the backing chain leads back into itself: qemu-img follows it until memory runs out.
    private(set) var isLoop = false
    private var random: SplitMix64
    private let places: Qcow2Places
    /// The name of the image's own file, for use as a backing file name.
    private let ownName: String

    init(_ image: [UInt8], ownName: String, seed: UInt64) {
        bytes = image
        self.ownName = ownName
        places = Qcow2Places(image)
        random = SplitMix64(seed: seed)
    }

    mutating func mutate() {
        // Picks a group first: otherwise nearly all changes would be in L2 tables.
        let groups = places.groups
        let number = random.below(groups.count + 1)
        guard number < groups.count else { return changeLength() }
        let place = random.pick(groups[number])
        guard place.offset + place.width <= bytes.count else { return changeLength() }
        if place.kind == .name { return changeName(place) }
        let old = bytes.number(place.offset, place.width)
        var new = value(for: place, old: old)
        if place.width < 8 { new &= 1 << (8 * UInt64(place.width)) - 1 }
        // An equal value would not be a change.
        if new == old { new ^= 1 }
        bytes.setNumber(place.offset, place.width, new)
        story.append("\(place.what) at \(place.offset): \(hex(old)) becomes \(hex(new))")
    }

    private func hex(_ number: UInt64) -> String { "0x" + String(number, radix: 16) }

    private mutating func value(for place: Qcow2Places.Place, old: UInt64) -> UInt64 {
        switch place.kind {
        case .number: number(old, width: place.width)
        case .flags: random.pick([0, .max, old ^ 1 << UInt64(random.below(64)), old | 3])
        case .offset: offset(old, of: place)
        case .entry: entry(old, of: place)
        case .descriptor: descriptor(old, of: place)
        case .subclusters: subclusters(old)
        case .name: old
        }
    }

    private mutating func number(_ old: UInt64, width: Int) -> UInt64 {
        let all: UInt64 = width == 8 ? .max : 1 << (8 * UInt64(width)) - 1
        return random.pick([
            0, 1, 2, old &- 1, old &+ 1, old &* 2, old / 2, all, all / 2, all / 2 + 1,
            old &+ 512, old &- 512, old ^ 1 << UInt64(random.below(8 * width)),
            UInt64(random.below(256)), UInt64(1) << UInt64(random.below(8 * width)),
        ])
    }

    /// An offset: 0, other structures of the image, its end, or values in between.
    private mutating func offset(_ old: UInt64, of place: Qcow2Places.Place) -> UInt64 {
        let cluster = UInt64(places.clusterSize)
        let end = UInt64(bytes.count)
        let whole = (end + cluster - 1) / cluster * cluster
        switch random.below(4) {
        case 0, 1: return UInt64(random.pick(places.structures))
        case 2:
            return random.pick([
                end, whole, whole - cluster, whole + cluster, whole &+ 1 << 20, 1 << 40,
                1 << 56 - cluster, 1 << 55, UInt64(place.offset) / cluster * cluster,
            ])
        default:
            return random.pick([
                0, .max, old &+ 1, old &+ 512, old &- 512, old &+ cluster, old &- cluster,
                old ^ 1 << UInt64(random.below(64)), 1 << 63, 1 << 56,
            ])
        }
    }

    /// An L1 or L2 entry, or a similar one.
    private mutating func entry(_ old: UInt64, of place: Qcow2Places.Place) -> UInt64 {
        switch random.below(4) {
        case 0: return offset(old, of: place)
        case 1: return offset(old & 0x00ff_ffff_ffff_fe00, of: place) | 1 << 63
        case 2: return random.once(in: 3) ? 1 << 62 | old : sibling(of: place)
        default:
            let bit = random.pick([63, 62, 0, 1, 8, 9, 56, 57, 61, random.below(64)])
            return old ^ 1 << UInt64(bit)
        }
    }

    private mutating func descriptor(_ old: UInt64, of place: Qcow2Places.Place) -> UInt64 {
        let countBits = UInt64(places.clusterBits - 8)
        let countShift = 62 - countBits
        let counts = (UInt64(1) << countBits - 1) << countShift
        let end = UInt64(bytes.count)
        return switch random.below(8) {
        case 0: sibling(of: place)
        case 1: old ^ counts
        case 2: old &+ random.pick([1, .max]) << countShift
        case 3: old &+ random.pick([1, 511, 512, .max])
        case 4: 1 << 62 | old & counts | random.pick([0, end, end - 1, end + 512, 1 << 50])
        case 5: old ^ 1 << UInt64(random.below(64))
        case 6: 1 << 62 | UInt64(random.pick(places.structures))
        default: entry(old, of: place)
        }
    }

    private mutating func subclusters(_ old: UInt64) -> UInt64 {
        let bit = UInt64(1) << UInt64(random.below(32))
        return random.pick([
            0, .max, 0xffff_ffff, 0xffff_ffff << 32, 1 << 32 | 1, old ^ bit, old ^ bit << 32,
            random.next(),
        ])
    }

    /// The value of another place of the same kind.
    private mutating func sibling(of place: Qcow2Places.Place) -> UInt64 {
        let others = places.groups.joined().filter { $0.kind == place.kind }
        let other = random.pick(others.isEmpty ? [place] : others)
        return other.offset + other.width <= bytes.count
            ? bytes.number(other.offset, other.width) : 0
    }

    private mutating func changeName(_ place: Qcow2Places.Place) {
        let range = place.offset..<place.offset + place.width
        switch random.below(6) {
        case 0: bytes.replaceSubrange(range, with: repeatElement(0, count: place.width))
        case 1: bytes.replaceSubrange(range, with: repeatElement(0xff, count: place.width))
        case 2: bytes.replaceSubrange(range, with: repeatElement(0x1b, count: place.width))
        case 3: bytes[range.lowerBound + random.below(place.width)] = UInt8(random.below(256))
        case 4: bytes[range.lowerBound] = UInt8(ascii: "\n")
        default:
            let name = Array(ownName.utf8.prefix(place.width))
            bytes.replaceSubrange(range.prefix(name.count), with: name)
            isLoop = isLoop || name.count == place.width
        }
        story.append("\(place.what) at \(place.offset): \(Array(bytes[range]))")
    }

    private mutating func changeLength() {
        let cluster = places.clusterSize
        let end = bytes.count
        let middle = random.below(end / cluster + 1) * cluster
        let choices = [
            middle, middle + 1, middle - 1, end - 1, end + 1, end - cluster, end + 3 * cluster, 72,
            104, 112, end / 2, random.below(end + 1), (end + cluster - 1) / cluster * cluster,
            middle + 512, middle - 512,
        ]
        let new = max(0, random.pick(choices))
        let added = [UInt8](repeating: 0, count: max(0, new - end))
        bytes = bytes.prefix(new) + added
        story.append("the file of \(end) bytes gets \(new)")
    }
}

extension [UInt8] {
    /// A big-endian number.
    func number(_ offset: Int, _ width: Int) -> UInt64 {
        self[offset..<offset + width].reduce(0) { $0 << 8 | UInt64($1) }
    }

    mutating func setNumber(_ offset: Int, _ width: Int, _ value: UInt64) {
        for index in 0..<width {
            self[offset + index] = UInt8(
                truncatingIfNeeded: value >> UInt64(8 * (width - 1 - index)))
        }
    }
}
