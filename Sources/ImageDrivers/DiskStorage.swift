import Concurrency
import DiskImage
import ImageFormats
import ImageStorage

/// The disk of an image as the storage of another: a description can put a format into the disk
/// that another format holds.
final class DiskStorage: Storage {
    private let image: OpenedImage
    private let disk: any ImageSource

    init(_ image: OpenedImage) {
        self.image = image
        disk = image.source
    }

    fileprivate var base: any Storage { image.topLayer.storage }

    var name: String { base.name }
    var size: Int64 { disk.virtualSize }
    var file: FileIdentity? { base.file }
    /// The files that the disk is read from.
    var files: [FileIdentity] { image.files }
    var allocatedSize: Int64? { base.allocatedSize }
    var readMeter: CallMeter { base.readMeter }

    var traits: StorageTraits {
        var traits = base.traits
        traits.isDevice = true
        traits.hasHoles = true
        return traits
    }

    func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let end = offset + Int64(buffer.byteCount)
        guard end <= size else { throw ImageError.beyondEnd(self, offset..<end) }
        try await disk.read(into: &buffer, at: offset)
    }

    func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        let found = try await disk.mappings(at: offset, limit: limit, holes: .thorough)
        let isHole = !found[0].needsReading
        let run = found.prefix { $0.needsReading != isHole }
        return Extent(range: offset..<run[run.endIndex - 1].range.upperBound, isHole: isHole)
    }
}

extension Storage {
    /// The storage that a part of a storage, or the disk of an image, lies in at last.
    var innermost: any Storage {
        switch self {
        case let part as StoragePart: part.whole.innermost
        case let disk as DiskStorage: disk.base.innermost
        default: self
        }
    }
}
