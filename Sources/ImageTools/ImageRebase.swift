import Concurrency
import DiskImage
import ImageConvert
import ImageDrivers
import ImageFormats
import ImageStorage

/// One `swimg rebase`: gives an overlay another backing file.
public struct ImageRebase: Sendable {
    public var overlay: ImageInPlace
    /// The new backing file, relative to the overlay; nil or an empty name is none.
    public var backing: ImageName?
    /// Name of the new backing file's format, which the overlay records.
    public var backingFormat: String?
    /// Changes the name alone (`-u`): the user vouches that the disk does not change.
    public var isUnsafe = false
    /// Compresses what is copied into the overlay (`-c`).
    public var compress = false
    /// How the backing files are opened.
    public var sourceAccess = StorageAccess()
    /// Called from any task with the number of bytes done and the size of the guest disk.
    public var onProgress: (@Sendable (_ done: Int64, _ total: Int64) -> Void)?

    public init(_ overlay: ImageInPlace) { self.overlay = overlay }

    /// - Throws: `ImageError`, or `CancellationError` if the task was cancelled. The overlay shows
    ///   the same disk on its old backing file then.
    public func run() async throws {
        let (storage, format) = try await overlay.open()
        guard isUnsafe else { return try await copyAndRename(storage, format) }
        try await renaming(storage, format)()
    }

    private var newName: ImageName? {
        backing.flatMap { $0.bytes.isEmpty ? nil : $0 }
    }

    /// - Returns: the operation that changes the name, which is known to have room.
    private func renaming(
        _ storage: any WritableStorage, _ format: ImageFormat
    ) async throws -> @Sendable () async throws -> Void {
        let failure = "Could not change the backing file to '\(backing ?? "(null)")': "
        guard newName == nil || backingFormat != nil else {
            throw ImageError.invalid(failure + "backing format must be specified")
        }
        guard let editor = format.driver.overlayEditor else {
            throw ImageError.invalid(failure + "Operation not supported")
        }
        do {
            return try await editor.prepareToRebase(
                storage, on: newName.map { BackingName($0, format: backingFormat) })
        } catch let error as ImageError where error.path == nil {
            throw ImageError(error.kind, failure + error.message)
        }
    }

    // MARK: The safe way

    private func copyAndRename(
        _ storage: any WritableStorage, _ format: ImageFormat
    ) async throws {
        // Images that can never have a backing file are refused before any other file is looked at.
        if format.driver.overlayEditor == nil { _ = try await renaming(storage, format) }
        let own = try await overlay.naming {
            try await format.driver.open(storage, snapshot: nil, key: overlay.key())
        }
        let data = try overlay.openData(of: own)
        let top = data.map { own.reading(dataFrom: $0) } ?? own
        let old = try await ImageOpener(sourceAccess).openChain(
            below: top.backing, of: overlay.name, in: storage)
        let new = try await newChain(in: storage, old)
        let rename = try await renaming(storage, format)
        try await copy(top, old, new, to: (storage, data), format)
        try await rename()
    }

    /// The chain that begins with the new backing file. An image of the old chain is not opened
    /// again: a description of the overlay has its secret, too.
    private func newChain(
        in storage: any Storage, _ old: [OpenedLayer]
    ) async throws -> [OpenedLayer] {
        guard let newName else { return [] }
        let format = backingFormat.flatMap { ImageFormat.ofBacking($0) }
        if let name = try? ImageOpener.backingName(newName, namedBy: overlay.place()),
            let place = old.firstIndex(where: { $0.name == name && $0.format == format })
        {
            return Array(old[place...])
        }
        do {
            return try await ImageOpener(sourceAccess).openBackingChain(
                BackingName(newName, format: backingFormat), of: try overlay.place(),
                in: storage)
        } catch let error as ImageError {
            throw ImageError(
                error.kind, "Could not open new backing file '\(newName)': \(error.description)")
        }
    }

    /// Writes to the overlay what it shows now and would not show on the new backing file.
    private func copy(
        _ top: any Image, _ old: [OpenedLayer], _ new: [OpenedLayer],
        to files: (image: any WritableStorage, data: (any WritableStorage)?),
        _ format: ImageFormat
    ) async throws {
        guard let creator = format.driver.creator else {
            throw ImageError.unsupported(
                files.image.name, "images of the format '\(format)' can only be read")
        }
        guard !compress || creator.canCompress else {
            throw ImageError.invalid("Compression not supported for this file format")
        }
        var settings = TargetSettings(minSparse: guestSectorSize)
        settings.compress = compress
        settings.isThere = true
        settings.getsBacking = newName != nil
        let before = try Self.disk(top, old)
        let after = try Self.disk(top, new)
        var written = try creator.existingImage(top, leavesBacking: true)
        if let data = files.data { written.setData(data) }
        let target = try await written.makeTarget(
            on: files.image, size: before.virtualSize, settings)
        var numbers = ImageNumbers()
        let difference = DifferenceSource(
            before, from: after, images: [0] + old.map { numbers.number(of: $0) },
            otherImages: [0] + new.map { numbers.number(of: $0) })
        let below = old.flatMap(\.storages)
        let holder = files.data ?? files.image
        holder.stopSharing(unlessWith: compress ? [] : below)
        var pipeline = Pipeline(
            from: top.storages + below + new.flatMap(\.storages), inPlace: holder)
        pipeline.shown = after
        // Zeros that the new backing file does not show are compared like data, too.
        pipeline.storesZeros = true
        if let onProgress {
            pipeline.onProgress = { done in onProgress(done, before.virtualSize) }
        }
        try await pipeline.copy(from: before, extents: difference, to: target)
    }

    /// The disk that the overlay shows on a chain, in whole sectors.
    private static func disk(
        _ top: any Image, _ chain: [OpenedLayer]
    ) throws(ImageError) -> ConcatenatedSource {
        try ConcatenatedSource([LayeredSource(layers: [top] + chain.map(\.image))])
    }
}

/// Numbers for the images of several chains; an image has one number in all of them.
private struct ImageNumbers {
    private struct Identity: Hashable {
        let file: FileIdentity
        let format: String
    }

    private var numbers: [Identity: Int] = [:]

    /// - Returns: nil if other names could mean the image, or another part of its file.
    mutating func number(of layer: OpenedLayer) -> Int? {
        guard let file = layer.storage.file, !(layer.storage is StoragePart) else { return nil }
        let identity = Identity(file: file, format: layer.format.name)
        let number = numbers[identity] ?? numbers.count + 1
        numbers[identity] = number
        return number
    }
}
