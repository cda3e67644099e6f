import Concurrency
import DiskImage

/// A part of another storage that reads like a storage of its own, such as a disk in an archive.
public final class StoragePart: Storage {
    private let base: any Storage
    private let start: Int64
    public let size: Int64

    /// - Parameters:
    ///   - offset: start of the part in bytes.
    ///   - size: length of the part in bytes; nil reaches to the end.
    /// - Throws: `ImageError` if `base` does not hold all of the part.
    public init(of base: any Storage, offset: Int64, size: Int64?) throws(ImageError) {
        guard offset >= 0, offset <= base.size else {
            throw .corrupt(
                base.name, "offset \(offset) lies beyond the end of the file (\(base.size) bytes)")
        }
        let rest = base.size - offset
        let wanted = size ?? rest
        guard wanted >= 0, wanted <= rest else {
            throw .corrupt(
                base.name,
                "\(wanted) bytes from offset \(offset) on reach beyond the end of the file "
                    + "(\(base.size) bytes)")
        }
        self.base = base
        start = offset
        self.size = wanted
    }

    /// The storage, of which this is a part, or a part of a part.
    public var whole: any Storage { (base as? StoragePart)?.whole ?? base }

    public var name: String { base.name }
    public var file: FileIdentity? { base.file }
    public var allocatedSize: Int64? { base.allocatedSize }
    public var readMeter: CallMeter { base.readMeter }

    public var traits: StorageTraits {
        var traits = base.traits
        traits.isDevice = true
        return traits
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let end = offset + Int64(buffer.byteCount)
        guard end <= size else { throw ImageError.beyondEnd(self, offset..<end) }
        try await base.read(into: &buffer, at: start + offset)
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        let found = try await base.extent(at: start + offset, limit: start + limit)
        return Extent(
            range: found.range.lowerBound - start..<found.range.upperBound - start,
            isHole: found.isHole)
    }
}
