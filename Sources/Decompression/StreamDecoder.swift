import DiskImage

/// The decoder of one kind of compression.
///
/// A compressed file is one stream or several, one behind the other.
protocol StreamDecoder: AnyObject {
    /// Decompresses as much as fits.
    ///
    /// - Parameter isLast: whether nothing follows the input.
    /// - Throws: `DecodingError`.
    func decode(
        _ input: UnsafeRawBufferPointer, isLast: Bool,
        into output: UnsafeMutableRawBufferPointer
    ) throws(DecodingError) -> DecodingStep

    /// Prepares for another stream after the end of one.
    func restart() throws(DecodingError)
}

/// The result of a call of a decoder.
struct DecodingStep {
    /// Number of bytes used of the input.
    var taken: Int
    /// Number of bytes written to the output.
    var made: Int
    /// Whether the stream has ended, with all checksums right.
    var isEnd: Bool
}

enum DecodingError: Error {
    case damaged
    case outOfMemory
    /// The file asks for more memory than a decoder may take.
    case needsTooMuchMemory
    /// The reason why a library cannot be used.
    case noLibrary(String)

    var reason: String {
        switch self {
        case .damaged: "the compressed data is damaged"
        case .outOfMemory: "not enough memory to decompress it"
        case .needsTooMuchMemory:
            "decompressing it takes more than \(Self.largestMemory >> 20) MiB of memory"
        case .noLibrary(let reason): reason
        }
    }

    /// Limit for the memory of a decoder in bytes. The strongest usual settings take 65 MiB (xz -9)
    /// and 128 MiB (zstd --ultra -22).
    static let largestMemory = 1 << 30
}
