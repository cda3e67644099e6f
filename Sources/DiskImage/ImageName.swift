/// The name of an image: bytes, as a person typed them or as a header has them.
///
/// A name is a path, or begins with a protocol and a colon (`nbd://host`, `json:{…}`). It need not
/// be text: the kernel forbids only NUL in paths, and a name that was decoded and encoded again
/// could lead to another file.
public struct ImageName: Sendable, Hashable, ExpressibleByStringLiteral, CustomStringConvertible {
    public let bytes: [UInt8]

    public init(bytes: some Sequence<UInt8>) { self.bytes = Array(bytes) }

    public init(_ text: String) { bytes = Array(text.utf8) }

    public init(stringLiteral text: String) { self.init(text) }

    /// The name for messages: bytes that are not UTF-8 become U+FFFD.
    public var description: String { String(decoding: bytes, as: UTF8.self) }

    private static let filePrefix = Array("file:".utf8)

    /// A byte that no keyboard types, for names that only a command line can make.
    public static let mark: UInt8 = 0x1f

    public var isMarked: Bool { bytes.contains(Self.mark) }

    /// The protocol that the name begins with; nil for a path.
    ///
    /// qemu takes everything before a colon as a protocol, unless a slash comes first.
    public var protocolName: String? {
        guard
            let end = bytes.firstIndex(where: { $0 == UInt8(ascii: ":") || $0 == HostPath.slash }),
            bytes[end] == UInt8(ascii: ":")
        else { return nil }
        return String(decoding: bytes[..<end], as: UTF8.self)
    }

    /// The path of the file or device that the name means. After `file:`, everything is a path,
    /// whatever it looks like.
    ///
    /// - Throws: `ImageError` for a zero byte, or for another protocol, which does not mean a file.
    public func path() throws(ImageError) -> HostPath {
        guard !bytes.contains(0) else {
            throw .invalid("'\(description)' is not the name of a file: it holds a zero byte")
        }
        let path = bytes.dropping(prefix: Self.filePrefix).map { HostPath(bytes: $0) }
        guard path == nil, let protocolName else { return path ?? HostPath(bytes: bytes) }
        throw ImageError.unsupported(
            description,
            "the protocol '\(protocolName)' is not supported (./ before it makes it a file's name)"
        ).asQemu("Unknown protocol '\(protocolName)'")
    }

    /// The name without `file:`, in a form that cannot be mistaken for a protocol.
    public var withoutFilePrefix: ImageName {
        bytes.dropping(prefix: Self.filePrefix).map { HostPath(bytes: $0).name } ?? self
    }
}

/// The path of a file, as the kernel takes it: bytes without NUL.
public struct HostPath: Sendable, Hashable, ExpressibleByStringLiteral, CustomStringConvertible {
    public let bytes: [UInt8]

    static let slash = UInt8(ascii: "/")

    public init(bytes: some Sequence<UInt8>) { self.bytes = Array(bytes) }

    public init(_ text: String) { bytes = Array(text.utf8) }

    public init(stringLiteral text: String) { self.init(text) }

    /// The path for messages: bytes that are not UTF-8 become U+FFFD.
    public var description: String { String(decoding: bytes, as: UTF8.self) }

    public var isAbsolute: Bool { bytes.first == Self.slash }

    /// The name of the file in its folder; empty if the path ends with a slash.
    public var fileName: [UInt8] {
        Array(bytes[(bytes.lastIndex(of: Self.slash).map { $0 + 1 } ?? 0)...])
    }

    /// The folder that contains the file.
    public var folder: HostPath {
        guard let end = bytes.lastIndex(of: Self.slash) else { return "." }
        return end == 0 ? "/" : HostPath(bytes: bytes[..<end])
    }

    /// Resolves a path that is written in this file; a relative one starts at the file's folder.
    public func resolving(_ other: HostPath) -> HostPath {
        guard !other.isAbsolute, let end = bytes.lastIndex(of: Self.slash) else { return other }
        return HostPath(bytes: bytes[...end] + other.bytes)
    }

    /// The path as the name of an image, in a form that cannot be mistaken for a protocol.
    public var name: ImageName {
        let name = ImageName(bytes: bytes)
        return name.protocolName == nil ? name : ImageName(bytes: Array("./".utf8) + bytes)
    }

    /// Calls `body` with the path as a C string.
    public func withCString<Result>(_ body: (UnsafePointer<CChar>) -> Result) -> Result {
        bytes.withCString(body)
    }
}

extension Collection where Element == UInt8 {
    public func starts(withASCII text: StaticString) -> Bool {
        text.withUTF8Buffer { starts(with: $0) }
    }

    /// The bytes after a prefix; nil if the bytes begin differently.
    public func dropping(prefix: some Collection<UInt8>) -> SubSequence? {
        starts(with: prefix) ? dropFirst(prefix.count) : nil
    }

    /// The bytes as text, for messages and for words that are always ASCII.
    public var text: String { String(decoding: self, as: UTF8.self) }

    /// Calls `body` with the bytes as a C string.
    public func withCString<Result, Failure: Error>(
        _ body: (UnsafePointer<CChar>) throws(Failure) -> Result
    ) throws(Failure) -> Result {
        try body(map { CChar(bitPattern: $0) } + [0])
    }
}
