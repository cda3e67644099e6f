import ArgumentParser
import CLinux
import DiskImage
import Glibc

/// Conversion of command-line words between the bytes that the process receives and the text that
/// the argument parser reads.
///
/// Each byte above 0x7f becomes one private-use character. Words that are not valid UTF-8 thus
/// survive the parser, and a combining mark at the start of a value cannot merge with the `=`
/// before it.
enum ArgumentBytes {
    /// Offset of the private-use characters for bytes, in Unicode's last plane.
    private static let base: UInt32 = 0x10ff00

    /// The words of the command line; the first is the program's name.
    static func commandLine() -> [[UInt8]] {
        (0..<clinux_argument_count()).compactMap { index in
            clinux_argument(index).map {
                Array(UnsafeRawBufferPointer(start: $0, count: strlen($0)))
            }
        }
    }

    /// A word in the form that the parser reads.
    static func escaped(_ word: [UInt8]) -> String {
        var text = String.UnicodeScalarView()
        for byte in word {
            let number = byte < 0x80 ? UInt32(byte) : base + UInt32(byte)
            // Never nil: no value here is a surrogate or above U+10FFFF.
            text.append(Unicode.Scalar(number) ?? "?")
        }
        return String(text)
    }

    /// The original bytes of a word that the parser returns.
    static func bytes(_ word: String) -> [UInt8] {
        word.unicodeScalars.flatMap { scalar in
            scalar.value > base
                ? [UInt8(truncatingIfNeeded: scalar.value)] : Array(String(scalar).utf8)
        }
    }

    /// Text for people from a message that quotes escaped words of the command line.
    static func readable(_ text: String) -> String { bytes(text).text }
}

extension ImageName: ExpressibleByArgument {
    public init?(argument: String) { self.init(bytes: ArgumentBytes.bytes(argument)) }
}

/// A list of options, or another value that can contain image names.
struct OptionText: ExpressibleByArgument {
    let bytes: [UInt8]

    init?(argument: String) { bytes = ArgumentBytes.bytes(argument) }
}
