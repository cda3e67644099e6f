import DiskImage
import Testing

@Suite struct ZeroScanTests {
    private func isZero(_ bytes: [UInt8], _ range: Range<Int>) -> Bool {
        ZeroScan.isZero(bytes.span.bytes, range)
    }

    /// Tries every length around the widths of the loops, and every position of a nonzero byte.
    @Test(arguments: [0, 1, 7, 8, 9, 63, 64, 65, 255, 256, 257, 512, 600])
    func findsOneByteAnywhere(length: Int) {
        var bytes = [UInt8](repeating: 0, count: length)
        #expect(isZero(bytes, 0..<length))
        for position in 0..<length {
            bytes[position] = 1
            #expect(!isZero(bytes, 0..<length), "position \(position)")
            // Bytes outside the range do not count.
            #expect(isZero(bytes, 0..<position))
            #expect(isZero(bytes, position + 1..<length))
            bytes[position] = 0
        }
    }

    @Test(arguments: [
        // unit 4, minimum 4: every zero unit counts
        ("AAAA0000BBBB", 4, 4, "D4 Z4 D4"),
        // units are aligned: zeros that fill none are data
        ("AA0000BBAAAA", 4, 4, "D12"),
        // shorter than the minimum
        ("AAAA0000BBBB", 4, 8, "D12"),
        ("AAAA00000000BBBB", 4, 8, "D4 Z8 D4"),
        // the last unit may be short
        ("AAAA000", 4, 4, "D7"), ("AAAA000", 4, 3, "D4 Z3"),
        // all zero: zero whatever the minimum
        ("000", 4, 4096, "Z3"), ("00000000", 4, 4096, "Z8"),
        ("0000AAAA", 4, 4, "Z4 D4"), ("", 4, 4, ""),
    ])
    func cutsIntoRuns(text: String, unit: Int, minimum: Int, expected: String) {
        let bytes = text.utf8.map { $0 == UInt8(ascii: "0") ? 0 : $0 }
        var runs: [String] = []
        var position = 0
        ZeroScan.forEachRun(
            in: bytes.span.bytes, 0..<bytes.count, unit: unit, minimum: minimum
        ) { run, isZero in
            #expect(run.lowerBound == position)
            position = run.upperBound
            runs.append("\(isZero ? "Z" : "D")\(run.count)")
        }
        #expect(position == bytes.count)
        #expect(runs.joined(separator: " ") == expected)
    }
}
