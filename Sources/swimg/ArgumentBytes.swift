import ArgumentParser
import CLinux
import DiskImage
import Glibc

/// The words of the command line between the bytes that the process got and the text that the
/// argument parser reads.
///
/// A byte beyond ASCII becomes one private character: so words that are no UTF-8 pass the parser
/// unharmed, and a combining mark at the start of a value melts into no `=` before it.
enum ArgumentBytes {
    /// Where the private characters for bytes begin, in Unicode's last plane (private use).
    private static let base: UInt32 = 0x10ff00

    /// The command line with the program's name first.
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
            // All of these are scalars.
            text.append(Unicode.Scalar(number) ?? "?")
        }
        return String(text)
    }

    /// The bytes of a word that the parser handed on.
    static func bytes(_ word: String) -> [UInt8] {
        word.unicodeScalars.flatMap { scalar in
            scalar.value > base
                ? [UInt8(truncatingIfNeeded: scalar.value)] : Array(String(scalar).utf8)
        }
    }

    /// Text in which words of the command line are quoted, for people.
    static func readable(_ text: String) -> String { bytes(text).text }
}

extension ImageName: ExpressibleByArgument {
    public init?(argument: String) { self.init(bytes: ArgumentBytes.bytes(argument)) }
}

/// A list of options, or another value in which names can stand.
struct OptionText: ExpressibleByArgument {
    let bytes: [UInt8]

    init?(argument: String) { bytes = ArgumentBytes.bytes(argument) }
}
