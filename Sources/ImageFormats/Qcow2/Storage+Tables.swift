import DiskImage
import ImageStorage

// Tables of big-endian numbers, read and written where they lie.
extension Storage {
    /// - Throws: `ImageError` if the range reaches beyond the end.
    func readBytes(
        at offset: HostOffset, count: Int64, _ what: String
    ) async throws -> [UInt8] {
        guard offset.bytes >= 0, offset.bytes <= size, count <= size - offset.bytes else {
            throw ImageError.corrupt(
                name,
                "the \(what) at offset \(offset.bytes) lies beyond the end of the file "
                    + "(\(size) bytes): the image is cut short or damaged")
        }
        var buffer = IOBuffer(byteCount: Int(count))
        var span = buffer.mutableBytes
        try await read(into: &span, at: offset.bytes)
        return buffer.bytes.withUnsafeBytes { Array($0) }
    }

    func readWords(
        at offset: HostOffset, bytes: Int64, _ what: String
    ) async throws -> [UInt64] {
        guard bytes > 0 else { return [] }
        let raw = try await readBytes(at: offset, count: bytes, what)
        let span = raw.span.bytes
        return (0..<raw.count / 8).map { span.bigEndian(at: $0 * 8, as: UInt64.self) }
    }
}

extension Array where Element == UInt64 {
    /// As they are stored.
    var bigEndianBytes: [UInt8] {
        map(\.bigEndian).withUnsafeBytes { [UInt8]($0) }
    }
}
