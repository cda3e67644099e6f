/// A small seeded generator, so that a failing case can be repeated (Vigna's SplitMix64).
public struct SplitMix64: RandomNumberGenerator, Sendable {
    private var state: UInt64

    public init(seed: UInt64) { state = seed }

    public mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var word = state
        word = (word ^ (word >> 30)) &* 0xbf58_476d_1ce4_e5b9
        word = (word ^ (word >> 27)) &* 0x94d0_49bb_1331_11eb
        return word ^ (word >> 31)
    }

    public mutating func below(_ limit: Int) -> Int { Int(next() % UInt64(limit)) }

    public mutating func pick<Element>(_ choices: [Element]) -> Element {
        choices[below(choices.count)]
    }

    /// True with a probability of one in `times`.
    public mutating func once(in times: Int) -> Bool { below(times) == 0 }
}

/// `count` bytes that do not compress; the seed determines them.
public func noise(_ seed: UInt64, _ count: Int) -> [UInt8] {
    var random = SplitMix64(seed: seed)
    var words = [UInt64](repeating: 0, count: (count + 7) / 8)
    for index in words.indices { words[index] = random.next().littleEndian }
    return words.withUnsafeBytes { Array($0.prefix(count)) }
}

/// Sectors that all differ, so that a misplaced one is detected; they compress well.
public func sectors(_ label: Character, first: Int, count: Int) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.reserveCapacity(count * 512)
    for sector in first..<first + count {
        let digits = String(sector)
        let line = "\(label) sector \(String(repeating: " ", count: 10 - digits.count))\(digits)"
        let text = Array((line + " of the test disk\n").utf8)
        for index in 0..<512 { bytes.append(text[index % text.count]) }
    }
    return bytes
}
