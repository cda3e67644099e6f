import DiskImage
import Glibc
import ImageStorage

/// The decompressed bytes of a stream.
final class DecompressedStream: ByteStream, @unchecked Sendable {
    private let compressed: any ByteStream
    private let decoder: any StreamDecoder
    private let name: String
    /// Memory for compressed bytes.
    private let input: UnsafeMutableRawBufferPointer
    // Used by the one call at a time:
    /// Positions of the bytes in `input` that were not decoded.
    private var rest = 0..<0
    /// Number of compressed bytes read.
    private var inputLength: Int64 = 0
    private var inputHasEnded = false
    /// Whether a compressed stream has ended, and no other one begun.
    private var isBetween = false

    private static let inputSize = 1 << 20

    /// - Throws: `ImageError` if there is not enough memory.
    init(
        _ compressed: any ByteStream, _ decoder: any StreamDecoder, name: String
    ) throws(ImageError) {
        self.compressed = compressed
        self.decoder = decoder
        self.name = name
        guard let memory = malloc(Self.inputSize) else { throw .outOfMemory(Self.inputSize) }
        input = UnsafeMutableRawBufferPointer(start: memory, count: Self.inputSize)
    }

    deinit { free(input.baseAddress) }

    func read(into buffer: inout MutableRawSpan) async throws -> Int {
        var count = 0
        while count < buffer.byteCount {
            if rest.isEmpty, !inputHasEnded { try await readInput() }
            if isBetween, try !beginNext() {
                if rest.isEmpty, inputHasEnded { break }
                continue
            }
            let step = try decode(into: &buffer, from: count)
            count += step.made
            rest = rest.lowerBound + step.taken..<rest.upperBound
            isBetween = step.isEnd
            if inputHasEnded, rest.isEmpty, step.made == 0, step.taken == 0, !step.isEnd {
                throw failure("is cut short: the compressed data ends too early")
            }
        }
        return count
    }

    var progress: StreamProgress? { compressed.progress }

    private func readInput() async throws {
        var bytes = input.mutableBytes
        let count = try await compressed.read(into: &bytes)
        inputHasEnded = count < input.count
        inputLength += Int64(count)
        rest = 0..<count
    }

    /// Begins another compressed stream behind the one that has ended, and passes over zeros that
    /// fill the file up to a whole block of a tape or a disk.
    ///
    /// - Returns: false if there is none in this part of the input.
    private func beginNext() throws -> Bool {
        let zeros = input[rest].prefix { $0 == 0 }.count
        rest = rest.lowerBound + zeros..<rest.upperBound
        guard !rest.isEmpty else { return false }
        do {
            try decoder.restart()
        } catch {
            throw failure(error.reason)
        }
        isBetween = false
        return true
    }

    private func decode(
        into buffer: inout MutableRawSpan, from position: Int
    ) throws(ImageError) -> DecodingStep {
        var room = buffer.slice(position..<buffer.byteCount)
        let output = room.withUnsafeMutableBytes { $0 }
        do {
            return try decoder.decode(
                UnsafeRawBufferPointer(rebasing: input[rest]), isLast: inputHasEnded, into: output)
        } catch {
            throw failure(error.reason)
        }
    }

    private func failure(_ reason: String) -> ImageError {
        .corrupt(name, "\(reason) (at about byte \(inputLength - Int64(rest.count)) of the file)")
    }
}
