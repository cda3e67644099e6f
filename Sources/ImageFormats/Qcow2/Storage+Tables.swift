import DiskImage
import ImageStorage

// Reading and writing tables of big-endian numbers.
extension Storage {
    /// Length in bytes up to which tables are read without a check of the memory, because opening
    /// an image checks it, and buffers leave the margin. Slices of L2 tables, of which many are
    /// read, are shorter.
    private static var longTable: Int64 { 256 << 10 }

    /// Reads a part of a table as bytes.
    ///
    /// - Throws: `ImageError` if the range reaches beyond the end.
    func readBytes(
        at offset: HostOffset, count: Int64, _ what: String
    ) async throws -> [UInt8] {
        let buffer = try await readTable(at: offset, count: count, what)
        return buffer.bytes.withUnsafeBytes { Array($0) }
    }

    func readWords(
        at offset: HostOffset, bytes: Int64, _ what: String
    ) async throws -> [UInt64] {
        guard bytes > 0 else { return [] }
        let buffer = try await readTable(at: offset, count: bytes, what)
        return buffer.bytes.bigEndianWords()
    }

    private func readTable(
        at offset: HostOffset, count: Int64, _ what: String
    ) async throws -> IOBuffer {
        guard offset.bytes >= 0, offset.bytes <= size, count <= size - offset.bytes else {
            throw ImageError.corrupt(
                name,
                "the \(what) at offset \(offset.bytes) lies beyond the end of the file "
                    + "(\(size) bytes): the image is cut short or damaged")
        }
        if count > Self.longTable { try MemoryMargin.check(for: 2 * Int(count)) }
        var buffer = try IOBuffer(byteCount: Int(count))
        var span = buffer.mutableBytes
        try await read(into: &span, at: offset.bytes)
        return buffer
    }

    /// Fills a buffer; bytes beyond the end of the file are zeros.
    ///
    /// - Returns: number of bytes that the file has in the range.
    func readAvailable(into buffer: inout IOBuffer, at offset: Int64) async throws -> Int {
        let count = buffer.byteCount
        let available = offset < size ? Int(min(Int64(count), size - offset)) : 0
        var span = buffer.mutableBytes
        if available > 0 {
            var part = span.slice(0..<available)
            try await read(into: &part, at: offset)
        }
        if available < count { span.zeroFill(available..<count) }
        return available
    }

    /// Reads a table of big-endian numbers as far as the file has it.
    func readWords(at offset: Int64, count: Int64) async throws -> [UInt64] {
        let there = max(0, min(count, (size - offset).dividedUp(by: 8)))
        guard there > 0 else { return [] }
        try MemoryMargin.check(for: 2 * Int(there) * 8)
        var buffer = try IOBuffer(byteCount: Int(there) * 8)
        _ = try await readAvailable(into: &buffer, at: offset)
        let bytes = buffer.bytes
        return bytes.bigEndianWords()
    }
}

extension WritableStorage {
    /// Writes big-endian numbers.
    func writeWords(_ words: [UInt64], at offset: Int64) async throws {
        // The words are copied twice.
        try MemoryMargin.check(for: 2 * words.count * 8)
        try await writeBytes(words.bigEndianBytes, at: offset)
    }
}

extension RawSpan {
    /// The bytes as big-endian 64-bit numbers.
    func bigEndianWords() -> [UInt64] {
        [UInt64](unsafeUninitializedCapacity: byteCount / 8) { words, count in
            for index in words.indices {
                words.initializeElement(at: index, to: bigEndian(at: index * 8, as: UInt64.self))
            }
            count = words.count
        }
    }
}

extension Array where Element: FixedWidthInteger {
    mutating func appendZeros(upTo newCount: Int) {
        append(contentsOf: repeatElement(0, count: Swift.max(0, newCount - count)))
    }
}

extension Array where Element == UInt64 {
    /// The bytes of the numbers as stored in an image.
    var bigEndianBytes: [UInt8] {
        map { $0.bigEndian }.withUnsafeBytes { [UInt8]($0) }
    }
}
