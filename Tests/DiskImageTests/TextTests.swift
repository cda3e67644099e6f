import DiskImage
import Testing

@Suite struct TextTests {
    @Test(
        arguments: [
            ("0", 0), ("512", 512), ("4k", 4096), ("4K", 4096), ("1M", 1 << 20), ("2G", 2 << 30),
            ("3T", 3 << 40), ("1P", 1 << 50), ("7E", 7 << 60), ("1.5k", 1536), ("10b", 10),
            ("0x10000", 65536), (" +12", 12),
        ] as [(String, Int64)])
    func readsSizes(text: String, bytes: Int64) {
        #expect(parseByteSize(text) == bytes)
    }

    @Test(arguments: [
        "", "k", "-1", "1x", "8E", "1.5", "1.k", ".5k", "1 k", "0x", "0xk", "٣", "1kk",
    ])
    func refusesOtherText(text: String) {
        #expect(parseByteSize(text) == nil)
    }

    @Test func errorsAreOnePrintableLine() {
        let error = ImageError.corrupt("disk\u{1b}[2J.qcow2", "two\nlines\u{9b}")
        #expect(error.description == "disk?[2J.qcow2: two?lines?")
    }

    @Test func rounds() {
        #expect(0.roundedUp(to: 8) == 0 && 1.roundedUp(to: 8) == 8 && 8.roundedUp(to: 8) == 8)
        #expect(15.roundedDown(to: 8) == 8 && 9.dividedUp(by: 8) == 2 && 0.dividedUp(by: 8) == 0)
        #expect(64.isPowerOfTwo && !0.isPowerOfTwo && !48.isPowerOfTwo)
    }
}
