import Concurrency
import DiskImage
import ImageConvert
import ImageDrivers
import ImageFormats
import ImageStorage

/// One `swimg commit`: writes what an overlay holds into one of the images below it, and empties
/// the overlay.
public struct ImageCommit: Sendable {
    public var overlay: ImageInPlace
    /// Name of the image that receives the content; nil is the overlay's backing file.
    public var base: ImageName?
    /// Leaves the overlay as it is (`-d`). With `base` it stays in any case, as in qemu-img: with a
    /// deeper base it shows the images between.
    public var keepsOverlay = false
    /// Largest number of bytes to write per second; nil sets no limit.
    public var rate: Int64?
    /// Called from any task with the number of bytes done and the size of the guest disk.
    public var onProgress: (@Sendable (_ done: Int64, _ total: Int64) -> Void)?

    public init(_ overlay: ImageInPlace) { self.overlay = overlay }

    /// - Throws: `ImageError`, or `CancellationError` if the task was cancelled. All images are
    ///   valid then. The overlay loses nothing before the base is on stable storage, but the base
    ///   can hold a part of the new content already.
    public func run() async throws {
        let (storage, format) = try await overlay.open()
        let own = try await overlay.naming {
            try await format.driver.open(storage, snapshot: nil, key: overlay.key())
        }
        let data = try overlay.openData(of: own)
        let top = data.map { own.reading(dataFrom: $0) } ?? own
        let chain = try await chain(below: top)
        let depth = try indexOfBase(in: chain, below: top)
        let base = chain[depth]
        let target = try open(
            base, protecting: top.storages.compactMap(\.file) + chain.flatMap(\.files))
        do {
            let empty =
                keepsOverlay || self.base != nil
                ? nil
                : try await format.driver.overlayEditor?.prepareToEmpty(
                    storage, data: data)
            // A base that cannot be written into is refused before it changes.
            _ = try base.written(base.image)
            // Images that are open read their tables where these were before the base grew.
            try await grow(base, on: target, to: top.sizeInSectors, chain[(depth + 1)...])
            let images = try await lockedImages(of: chain, depth, on: target)
            try await copy([top] + images, depth: depth + 1, base, to: target)
            try await target.commit()
            try await empty?()
        } catch {
            target.abandon()
            throw error
        }
    }

    // MARK: The images

    private func chain(below top: any Image) async throws -> [OpenedLayer] {
        // The base is locked when it is opened for writing.
        var opener = ImageOpener(overlay.access)
        opener.access.shareForced = true
        let chain = try await opener.openChain(
            below: top.backing, of: overlay.name, in: top.storage)
        guard !chain.isEmpty else {
            throw ImageError.invalid("Image does not have a backing file")
        }
        return chain
    }

    /// Relative names of the base count from the image above, as in that image.
    private func indexOfBase(
        in chain: [OpenedLayer], below top: any Image
    ) throws(ImageError) -> Int {
        guard let base else { return 0 }
        var above = (name: try overlay.place(), backing: top.backing?.name)
        for (index, layer) in chain.enumerated() {
            if base == above.backing || Self.means(base, in: above.name, layer) { return index }
            above = (layer.name, layer.image.backing?.name)
        }
        throw .invalid("Did not find '\(base)' in the backing chain of '\(overlay.name)'")
    }

    private static func means(
        _ base: ImageName, in above: ImageName, _ layer: OpenedLayer
    ) -> Bool {
        guard let name = try? ImageOpener.backingName(base, namedBy: above) else { return false }
        if name == layer.name { return true }
        guard let file = layer.storage.file, let path = try? name.path() else { return false }
        return FileIdentity(path: path) == file
    }

    private func open(
        _ base: OpenedLayer, protecting files: [FileIdentity]
    ) throws -> TargetFiles {
        guard !(base.storage is StoragePart) else {
            throw ImageError.unsupported(
                base.name.description, "an image that is a part of a file can only be read")
        }
        let others = Set(files).subtracting(base.files)
        return try TargetFiles(
            into: base.name, data: base.dataName,
            TargetRequest(.writeInto, access: overlay.access, sourceFiles: others),
            isTyped: false)
    }

    /// The images of the chain, locked against other writers.
    private func lockedImages(
        of chain: [OpenedLayer], _ depth: Int, on target: TargetFiles
    ) async throws -> [any Image] {
        let opener = ImageOpener(overlay.access)
        var images: [any Image] = []
        var above = try overlay.place()
        for (index, layer) in chain.enumerated() {
            let key = opener.key(layer.description)
            if index == depth {
                let base = try await layer.format.driver.open(
                    target.storage, snapshot: nil, key: key)
                images.append(target.dataStorage.map { base.reading(dataFrom: $0) } ?? base)
            } else if layer.storage is StoragePart {
                images.append(layer.image)
            } else {
                images.append(try await opener.openLocked(layer, namedBy: above))
            }
            above = layer.name
        }
        return images
    }

    /// - Parameter below: the backing chain of the base.
    private func grow(
        _ base: OpenedLayer, on target: TargetFiles, to size: Int64,
        _ below: ArraySlice<OpenedLayer>
    ) async throws {
        guard base.image.virtualSize < size else { return }
        guard let resizer = base.format.driver.resizer else {
            throw ImageError.unsupported(
                base.name.description,
                "is smaller than the overlay, and images of the format '\(base.format)' cannot be "
                    + "resized")
        }
        try await resizer.resize(
            target.storage, key: ImageOpener(overlay.access).key(base.description),
            preallocation: .off,
            openBacking: { _ in below.disk },
            openData: { _ in target.dataStorage },
            newSize: { _ in size })
    }

    // MARK: The copy

    /// - Parameters:
    ///   - images: the overlay first.
    ///   - depth: index of the base.
    private func copy(
        _ images: [any Image], depth: Int, _ base: OpenedLayer, to files: TargetFiles
    ) async throws {
        // Zeros in the overlay's data stay data, which needs no search.
        var settings = TargetSettings(minSparse: 0)
        settings.looksForZeros = true
        settings.isThere = true
        let size = images[0].sizeInSectors
        var written = try base.written(images[depth])
        if let data = files.dataStorage { written.setData(data) }
        let target = try await written.makeTarget(on: files.storage, size: size, settings)
        let (content, extents) = try sources(images, depth, oldSize: base.image.virtualSize)
        let above = images[..<depth].flatMap(\.storages)
        let holder = files.dataStorage ?? files.storage
        holder.stopSharing(unlessWith: above)
        var pipeline = Pipeline(from: above, inPlace: holder)
        pipeline.bytesPerSecond = rate
        if let onProgress {
            pipeline.onProgress = { done in onProgress(done, content.virtualSize) }
        }
        try await pipeline.copy(from: content, extents: extents, to: target)
    }

    /// The disk as it is, and the disk without what the base holds. Both go on to the end of the
    /// base's cluster in which the overlay ends, because clusters are written whole.
    private func sources(
        _ images: [any Image], _ depth: Int, oldSize: Int64
    ) throws(ImageError) -> (content: any ImageSource, extents: any ImageSource) {
        let base = LayeredSource(layers: Array(images[depth...]))
        // The base does not show behind the end of an image between, or behind the end that it had:
        // a LUKS disk that has grown shows noise there.
        let shown = images[1..<depth].map(\.virtualSize).reduce(oldSize, min)
        let own = LayeredSource(layers: Array(images[..<depth]), sizeBelow: shown)
        let size = images[0].sizeInSectors
        let end = min(base.virtualSize, size.roundedUp(to: images[depth].readGranularity))
        let all = LayeredSource(layers: images)
        guard end > size else {
            return try (ConcatenatedSource([all]), ConcatenatedSource([own]))
        }
        return (
            try ConcatenatedSource([all, SliceSource(base, size..<end)]),
            try ConcatenatedSource([own, UnallocatedSource(virtualSize: end - size)])
        )
    }
}

extension OpenedLayer {
    /// The image as one to write into.
    fileprivate func written(_ image: any Image) throws(ImageError) -> any WrittenImage {
        guard let creator = format.driver.creator else {
            throw ImageError.unsupported(
                image.storage.name, "images of the format '\(format)' can only be read")
        }
        return try creator.existingImage(image, leavesBacking: true)
    }
}

extension Image {
    /// The size of the disk in bytes, with all of its last sector.
    fileprivate var sizeInSectors: Int64 { virtualSize.roundedUp(to: guestSectorSize) }

    /// The storage of the image and that of its data file.
    var storages: [any Storage] { needsDataFile ? [storage, dataStorage] : [storage] }
}

/// A part of a disk that is left to the target.
private struct UnallocatedSource: ImageSource {
    let virtualSize: Int64
    var layers: [any ImageLayer] { [] }

    func mappings(at offset: Int64, limit: Int64, holes: HoleSearch) -> [Mapping] {
        [Mapping(offset..<limit, .unallocated)]
    }
}

extension Pipeline {
    /// The engine with limits that suit images that are there.
    init(from sources: [any Storage], inPlace target: any WritableStorage) {
        self.init(baseWorkers: IOExecutor.coreCount + 2, writesInOrder: false)
        readMeters = sources.map(\.readMeter)
        writeMeter = target.writeMeter
        let all = sources.map(\.traits) + [target.traits]
        let requests = all.reduce(0) { $0 + $1.requestsInFlight }
        guard requests > 0 else { return }
        baseWorkers = max(baseWorkers, requests)
        chunkSize = all.map(\.requestSize).max() ?? 0
        readsAhead = all.contains(where: \.readsAhead)
    }
}
