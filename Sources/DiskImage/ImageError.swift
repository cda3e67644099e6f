/// An error about an image, in words that a person can act on.
///
/// `description` is one line: file, operation, place and reason.
public struct ImageError: Error, Sendable, Equatable, CustomStringConvertible {
    public enum Kind: Sendable, Equatable {
        /// The system refused an operation; `errno` says why.
        case system(errno: Int32)
        /// The bytes of the image contradict its format.
        case corrupt
        /// A valid image or request that this version cannot serve.
        case unsupported
        /// A request that makes no sense.
        case invalid
    }

    public let kind: Kind
    /// The file that the error is about; nil if no file is to blame.
    public let path: String?
    /// The description without the file name.
    public let message: String

    public init(_ kind: Kind, path: String? = nil, _ message: String) {
        self.kind = kind
        self.path = path
        self.message = message
    }

    public static func corrupt(_ path: String, _ message: String) -> ImageError {
        ImageError(.corrupt, path: path, message)
    }

    public static func unsupported(_ path: String, _ message: String) -> ImageError {
        ImageError(.unsupported, path: path, message)
    }

    public static func invalid(_ message: String) -> ImageError {
        ImageError(.invalid, message)
    }

    public var description: String {
        (path.map { "\($0): \(message)" } ?? message).withoutControlCharacters
    }
}

extension String {
    /// The string with `?` for control characters, and so escape sequences and line breaks.
    /// Strangers choose names and feature strings in image files, and text goes to a terminal.
    public var withoutControlCharacters: String {
        // In UTF-8 the other control characters, U+0080 to U+009F, begin with 0xc2.
        guard utf8.contains(where: { $0 < 0x20 || $0 == 0x7f || $0 == 0xc2 }) else { return self }
        return String(
            String.UnicodeScalarView(
                unicodeScalars.map { scalar in
                    scalar.value < 0x20 || (0x7f...0x9f).contains(scalar.value) ? "?" : scalar
                }))
    }
}
