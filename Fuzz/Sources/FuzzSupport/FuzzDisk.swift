import DiskImage
import ImageFormats
import ImageStorage

/// A guest disk, cut to the size that a fuzzer has time for.
public struct FuzzDisk {
    private let source: Qcow2Source
    /// Size limit of a disk in bytes. Small clusters and small disks reach all that large ones do.
    private static let limit: Int64 = 2 << 20

    public init(_ source: Qcow2Source) { self.source = source }

    /// Asks for all mappings.
    public func walk() async throws {
        let end = min(source.virtualSize, Self.limit)
        for holes in [HoleSearch.thorough, .asQemu] {
            var position: Int64 = 0
            while position < end {
                let found = try await source.mappings(at: position, limit: end, holes: holes)
                precondition(!found.isEmpty)
                for mapping in found {
                    precondition(
                        mapping.range.lowerBound == position && mapping.range.upperBound <= end
                            && !mapping.range.isEmpty, "\(mapping) at \(position)")
                    position = mapping.range.upperBound
                }
            }
        }
    }

    /// - Throws: `ImageError` for a disk that cannot be read, or exceeds the limit.
    public func content() async throws -> [UInt8] {
        guard source.virtualSize <= Self.limit else { throw ImageError.invalid("too large") }
        let piece = 48 << 10
        var content: [UInt8] = []
        for start in stride(from: 0, to: source.virtualSize, by: piece) {
            var buffer = try IOBuffer(
                byteCount: Int(min(Int64(piece), source.virtualSize - start)))
            var bytes = buffer.mutableBytes
            try await source.read(into: &bytes, at: start)
            content += buffer.bytes.withUnsafeBytes { Array($0) }
        }
        return content
    }
}
