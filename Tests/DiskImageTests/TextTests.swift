import DiskImage
import Testing

@Suite struct TextTests {
    @Test(
        arguments: [
            ("0", 0), ("512", 512), ("4k", 4096), ("4K", 4096), ("1M", 1 << 20), ("2G", 2 << 30),
            ("3T", 3 << 40), ("1P", 1 << 50), ("7E", 7 << 60), ("1.5k", 1536), ("10b", 10),
            ("0x10000", 65536), (" +12", 12), ("1024.0", 1024), ("1024.0b", 1024), ("5.", 5),
            ("1.k", 1024), ("0.0005k", 1), ("0.0004k", 0), ("0x10k", 16384), ("0x1e", 30),
        ] as [(String, Int64)])
    func readsSizes(text: String, bytes: Int64) {
        #expect(Int64(byteSize: text) == bytes)
    }

    @Test(arguments: [
        "", "k", "-1", "-0", "1x", "8E", "1.5", ".5k", "1 k", "0x", "0xk", "٣", "1kk", "0x1.8",
        "1e3", "1.5e3k", "0.5b", "1.1.1", "++1", "+-1", "1.kk", "1.5 k", "9007199254740993k",
    ])
    func refusesOtherText(text: String) {
        #expect(Int64(byteSize: text) == nil)
    }

    @Test(
        arguments: [
            ("0", 0), ("12", 12), (" +12", 12), ("-12", -12), ("0x10", 16), ("-0X10", -16),
            ("010", 8), ("", nil), ("-", nil), ("--1", nil), ("+-1", nil), ("0x", nil),
            ("09", nil), ("1.0", nil), ("1k", nil), ("9223372036854775808", nil),
        ] as [(String, Int64?)])
    func readsNumbersAsC(text: String, number: Int64?) {
        #expect(Int64(asInC: text) == number)
    }

    @Test(
        arguments: [
            ("a=1,b", ["a=1", "b"]), ("a=x,,y,b", ["a=x,y", "b"]), ("a,,b=1", ["a", "", "b=1"]),
            ("a=1,,,b", ["a=1,", "b"]), ("a=b=,,c", ["a=b=,c"]), ("", [""]), (",", ["", ""]),
        ] as [(String, [String])])
    func splitsLists(text: String, words: [String]) {
        #expect(OptionWords.split(text.utf8).map(\.text) == words)
    }

    @Test(
        arguments: [
            ("", false), (",", false), (",a", false), ("a,", false), ("a,,", true),
            ("a=1,,,", false), ("a", true), ("a,,,b", true),
        ] as [(String, Bool)])
    func knowsLists(text: String, isList: Bool) {
        #expect(OptionWords.isList(Array(text.utf8)) == isList)
    }

    @Test func errorsHaveAnotherFormForQemu() {
        let missing = ImageError(.system(errno: 2), path: "base", "cannot open: No such file")
        #expect(missing.qemuDescription == "base: Could not open 'base': No such file")
        #expect(
            missing.opening("over", depth: 2).qemuDescription
                == "Could not open 'over': Could not open backing file: "
                + "Could not open backing file: Could not open 'base': No such file")
        let noted = missing.noting("the backing file of over")
        #expect(noted.description == "base: cannot open: No such file (the backing file of over)")
        #expect(noted.opening("over").qemuDescription.hasSuffix("'base': No such file"))
        let other = ImageError.invalid("wrong\u{1b}").asQemu("bad\u{1b}\n", hint: "see\nhelp")
        #expect(other.description == "wrong?" && other.qemuDescription == "bad??\nsee\nhelp")
        #expect(other.about("x").qemuDescription == "x: bad??\nsee\nhelp")
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
