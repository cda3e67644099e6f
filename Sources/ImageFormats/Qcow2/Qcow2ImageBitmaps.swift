import DiskImage
import ImageStorage

/// Changes the persistent bitmaps of qcow2 images.
struct Qcow2ImageBitmaps: BitmapEditor {
    func bitmaps(of storage: any Storage) async throws -> [ImageBitmap]? {
        let image = try await Qcow2WritableImage.examining(storage)
        guard image.header.version >= 3 else { return nil }
        return try await Qcow2BitmapList(reading: image).bitmaps.map {
            ImageBitmap(
                name: $0.nameBytes, granularity: $0.granularity, isEnabled: $0.isAuto,
                isBroken: $0.isInUse)
        }
    }

    func change(_ storage: any WritableStorage, _ changes: [BitmapChange]) async throws {
        let header = try await Qcow2Header.read(from: storage)
        var (image, refcounts) = try await Qcow2WritableImage.sound(storage, header)
        var list = try await Qcow2BitmapList(reading: image)
        for change in changes {
            for action in change.actions {
                do {
                    try await apply(action, change, image, &list)
                } catch let error as ImageError {
                    throw ImageError(
                        error.kind, path: error.path,
                        "Operation \(action.word) on bitmap \(change.name.text) failed: "
                            + error.message)
                }
            }
        }
        try await list.store(in: &image, &refcounts)
    }

    private func apply(
        _ action: BitmapChange.Action, _ change: BitmapChange, _ image: Qcow2WritableImage,
        _ list: inout Qcow2BitmapList
    ) async throws {
        switch action {
        case .add(let granularity): try add(change.name, granularity, image, &list)
        case .remove: list.remove(at: try find(change.name, in: list))
        case .removeAll:
            while let last = list.bitmaps.indices.last { list.remove(at: last) }
        case .clear: try list.clear(at: try findSound(change.name, in: list), image.geometry)
        case .enable: list.setAuto(true, at: try findSound(change.name, in: list))
        case .disable: list.setAuto(false, at: try findSound(change.name, in: list))
        case .merge(let other):
            let index = try findSound(change.name, in: list)
            try await list.load(at: index, of: image)
            list.merge(try await bits(of: other, change, image, list), at: index)
        }
    }

    private func find(
        _ name: [UInt8], in list: Qcow2BitmapList
    ) throws(ImageError) -> Int {
        guard let index = list.index(of: name) else {
            throw .invalid("Dirty bitmap '\(name.text)' not found")
        }
        return index
    }

    /// Finds a bitmap that was saved properly: of any other, nothing is known but the name.
    private func findSound(
        _ name: [UInt8], in list: Qcow2BitmapList
    ) throws(ImageError) -> Int {
        let index = try find(name, in: list)
        guard !list.bitmaps[index].isInUse else { throw list.bitmaps[index].inconsistent }
        return index
    }

    private func add(
        _ name: [UInt8], _ granularity: Int64?, _ image: Qcow2WritableImage,
        _ list: inout Qcow2BitmapList
    ) throws(ImageError) {
        guard !name.isEmpty else { throw .invalid("Bitmap name cannot be empty") }
        guard list.index(of: name) == nil else {
            throw .invalid("Bitmap already exists: \(name.text)")
        }
        guard name.count <= Qcow2Bitmap.maximumNameLength else {
            throw .invalid(
                "Can't make bitmap persistent: Name length exceeds maximum "
                    + "(\(Qcow2Bitmap.maximumNameLength) characters)")
        }
        guard image.header.version >= 3 else {
            throw .invalid("Cannot store dirty bitmaps in qcow2 v2 files")
        }
        guard list.bitmaps.count < Qcow2BitmapDirectory.maximumCount else {
            throw .invalid("Maximum number of persistent bitmaps is already reached")
        }
        let granularity = granularity ?? min(max(image.geometry.clusterSize, 4096), 65536)
        guard granularity.isPowerOfTwo,
            Qcow2Bitmap.granularityBits.contains(granularity.trailingZeroBitCount)
        else { throw .invalid("Granularity must be power of 2 and at least 512") }
        try list.append(
            Qcow2Bitmap(name: name, granularity: granularity, isAuto: true), image.geometry)
    }

    /// The bits to merge.
    private func bits(
        of name: [UInt8], _ change: BitmapChange, _ image: Qcow2WritableImage,
        _ list: Qcow2BitmapList
    ) async throws -> BitmapBits {
        var (image, list) = (image, list)
        if let source = change.source {
            let size = image.geometry.virtualSize
            image = try await .examining(source)
            guard change.sourceMayDifferInSize || image.geometry.virtualSize == size else {
                throw ImageError.invalid(
                    "Bitmaps are of different sizes (destination size is \(size), source size is "
                        + "\(image.geometry.virtualSize)) and can't be merged")
            }
            list = try await Qcow2BitmapList(reading: image)
        }
        let index = try findSound(name, in: list)
        try await list.load(at: index, of: image)
        guard let bits = list.bits(at: index) else {
            throw ImageError.invalid("Dirty bitmap '\(name.text)' not found")
        }
        return bits
    }
}
