import DiskImage
import ImageStorage

/// Reads a table of entries of different lengths, from front to back and in large reads.
struct MetadataCursor: ~Copyable {
    private static let bufferSize = 64 << 10

    private let storage: any Storage
    private let what: String
    /// Largest possible end of the table, in bytes from the start of the storage.
    private let end: Int64
    /// Offset of the next entry, in bytes from the start of the storage.
    private(set) var position: Int64
    /// Whether bytes behind the end of the storage read as zeros.
    private let isTolerant: Bool
    private var buffer: IOBuffer
    /// Range of the storage that the buffer holds, in bytes.
    private var held: Range<Int64>

    /// - Parameters:
    ///   - what: name of the table, for messages.
    ///   - maximum: largest possible length of the table in bytes.
    ///   - isTolerant: whether bytes behind the end of the storage read as zeros.
    init(
        _ storage: any Storage, _ what: String, at offset: UInt64, maximum: Int64,
        isTolerant: Bool = false
    ) throws(ImageError) {
        guard let start = Int64(exactly: offset), isTolerant || start <= storage.size else {
            throw .corrupt(
                storage.name, "the \(what) at offset \(offset) lies beyond the end of the file")
        }
        buffer = try IOBuffer(byteCount: Self.bufferSize)
        self.storage = storage
        self.what = what
        position = start
        self.isTolerant = isTolerant
        held = start..<start
        end = start + min(maximum, Int64.max - start)
    }

    /// Returns the next bytes of the table.
    ///
    /// - Parameter count: number of bytes. It is not checked against the memory, so it should not
    ///   exceed some 130 KiB.
    /// - Throws: `ImageError` if the table or the file ends before.
    mutating func next(_ count: Int) async throws -> [UInt8] {
        guard Int64(count) <= end - position else {
            throw ImageError.corrupt(storage.name, "the \(what) is too large or damaged")
        }
        guard isTolerant || Int64(count) <= storage.size - position else {
            throw ImageError.corrupt(
                storage.name, "the \(what) lies beyond the end of the file (\(storage.size) bytes)")
        }
        var result: [UInt8] = []
        result.reserveCapacity(count)
        while result.count < count {
            if !held.contains(position) { try await fill() }
            let wanted = min(held.upperBound, position + Int64(count - result.count))
            let part = Int(position - held.lowerBound)..<Int(wanted - held.lowerBound)
            buffer.bytes.extracting(part).withUnsafeBytes { result.append(contentsOf: $0) }
            position = wanted
        }
        return result
    }

    /// Skips the bytes before the next multiple of `multiple` in the storage.
    mutating func align(to multiple: Int64) { position = position.roundedUp(to: multiple) }

    mutating func skip(_ count: Int64) { position += count }

    private mutating func fill() async throws {
        let start = position
        _ = try await storage.readAvailable(into: &buffer, at: start)
        held = start..<start + Int64(Self.bufferSize)
    }
}

extension Array where Element == UInt8 {
    /// A big-endian number at a byte offset.
    func bigEndian<Number: FixedWidthInteger>(at offset: Int, as type: Number.Type) -> Number {
        self[offset..<offset + MemoryLayout<Number>.size].reduce(0) { $0 << 8 | Number($1) }
    }

    /// Text up to the first NUL byte.
    func text(_ range: Range<Int>) -> String {
        String(decoding: self[range].prefix { $0 != 0 }, as: UTF8.self)
    }
}
