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
    public private(set) var message: String
    /// Where qemu-img would say something else; see `qemuDescription`.
    private var qemu = QemuWords()

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

/// The parts of an error that qemu-img words differently.
private struct QemuWords: Sendable, Equatable {
    /// Replaces the message.
    var message: String?
    /// Lines after the message; text of this program, never a name.
    var hint: String?
    /// The image that could not be opened, as the command line names it.
    var unopened: String?
    /// Whether no image is named.
    var standsAlone = false
}

extension ImageError {
    /// The error as qemu-img 7.2 prints it, for a program that is called by that name: callers
    /// search for `Could not open 'NAME': …`, and some of its messages have more lines than one.
    public var qemuDescription: String {
        var line = qemuMessage
        if let image = qemu.unopened {
            line = "Could not open '\(image)': \(line)"
        } else if let path, !qemu.standsAlone {
            line = "\(path): \(line)"
        }
        return line.withoutControlCharacters + (qemu.hint.map { "\n\($0)" } ?? "")
    }

    /// The message in qemu-img's words: it names files that cannot be opened or made, no others.
    public var qemuMessage: String {
        if let words = qemu.message { return words }
        guard let path else { return message }
        for operation in ["open", "create"] where message.hasPrefix("cannot \(operation): ") {
            let reason = message.dropFirst("cannot \(operation): ".count)
            return "Could not \(operation) '\(path)': \(reason)"
        }
        return message
    }

    /// Says of an error that it kept an image from being opened. The last image that is named
    /// counts: it is the one that a person named.
    ///
    /// - Parameter depth: number of images between that one and the error, each the backing file of
    ///   its predecessor.
    public func opening(_ image: String, depth: Int = 0) -> ImageError {
        guard !qemu.standsAlone else { return self }
        var error = self
        error.qemu.unopened = image
        error.qemu.message =
            String(repeating: "Could not open backing file: ", count: depth) + qemuMessage
        return error
    }

    /// Whether the error kept an image from being opened.
    public var isOfOpening: Bool { qemu.unopened != nil }

    /// Adds a remark to the message that qemu-img would not make.
    public func noting(_ remark: String) -> ImageError {
        var error = self
        error.qemu.message = qemuMessage
        error.message += " (\(remark))"
        return error
    }

    /// Gives the error the words that qemu-img has for it.
    ///
    /// - Parameters:
    ///   - hint: lines that follow.
    ///   - standsAlone: whether qemu-img does not name the image.
    public func asQemu(
        _ message: String? = nil, hint: String? = nil, standsAlone: Bool = false
    ) -> ImageError {
        var error = self
        error.qemu.message = message
        error.qemu.hint = hint
        error.qemu.standsAlone = standsAlone
        return error
    }

    /// Blames another file.
    public func about(_ path: String) -> ImageError {
        var error = ImageError(kind, path: path, message)
        error.qemu = qemu
        return error
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
