import DiskImage
import ImageFormats
import ImageStorage

// Data files: files that hold the data of an image whose own file holds its tables only.
extension ImageOpener {
    /// The name of an image's data file, if the gate permits it.
    ///
    /// As in qemu, a name in the image is a path whatever it looks like, and a relative path counts
    /// from the working directory.
    ///
    /// - Parameters:
    ///   - described: data file of the image's description, which the name in the image yields to.
    ///   - isTyped: whether a person typed that description.
    /// - Returns: nil if the image holds its data itself.
    /// - Throws: `ImageError`, what the gate throws.
    private func dataName(
        of image: any Image, at place: ImageName, described: ImageName?, isTyped: Bool
    ) throws -> ImageName? {
        guard image.needsDataFile else {
            guard described == nil else {
                throw ImageError(
                    .invalid, path: place.description,
                    "'data-file' can only be set for images with an external data file")
            }
            return nil
        }
        guard let name = described ?? image.dataFile?.name else {
            throw ImageError(
                .invalid, path: place.description, "'data-file' is required for this image")
        }
        if described == nil || !isTyped { try backingGate(name, place) }
        return name
    }

    /// Opens the data file of an image for reading; see `dataName`.
    func openData(
        of image: any Image, at place: ImageName, described: ImageName?, isTyped: Bool
    ) throws -> (storage: any Storage, name: ImageName)? {
        guard
            let name = try dataName(of: image, at: place, described: described, isTyped: isTyped)
        else { return nil }
        let isTyped = isTyped && described != nil
        let data = try Self.blaming(dataOf: place, for: name) { () throws(ImageError) in
            try openPlace(name, isTyped: isTyped)
        }
        try Self.check(dataFile: data.file, of: image.storage)
        return (data, name)
    }

    /// Opens the data file of an image that is changed in place.
    ///
    /// - Parameter described: data file of the image's description, which a person typed.
    /// - Returns: nil if the image holds its data itself.
    /// - Throws: `ImageError`, what the gate throws.
    public func openDataInPlace(
        of image: any Image, at place: ImageName, described: ImageName? = nil
    ) throws -> (any WritableStorage)? {
        guard
            let name = try dataName(of: image, at: place, described: described, isTyped: true)
        else { return nil }
        // Before it is opened: its lock would only tell that the file is in use.
        let file = (try? name.path()).flatMap { FileIdentity(path: $0) }
        try Self.check(dataFile: file, of: image.storage)
        return try Self.blaming(dataOf: place, for: name) { () throws(ImageError) in
            try Storages.driver(for: name, isTyped: described != nil).openInPlace(name, access)
        }
    }

    /// Opens an image of a chain once more, locked against other writers, with its data file.
    ///
    /// - Parameter overlay: the image that names this one.
    public func openLocked(
        _ layer: OpenedLayer, namedBy overlay: ImageName
    ) async throws -> any Image {
        let storage = try await openStorage(layer.name, namedBy: overlay)
        let image = try await layer.format.driver.open(
            storage, snapshot: nil, key: key(layer.description))
        let data = try openData(
            of: image, at: layer.name, described: layer.description?.dataFile, isTyped: false)
        return data.map { image.reading(dataFrom: $0.storage) } ?? image
    }

    private static func check(
        dataFile: FileIdentity?, of storage: any Storage
    ) throws(ImageError) {
        guard let dataFile, dataFile == storage.file else { return }
        throw .corrupt(storage.name, "the image names itself as its data file")
    }

    /// Adds to an error the image that a data file belongs to.
    private static func blaming<Result>(
        dataOf image: ImageName, for name: ImageName, _ body: () throws(ImageError) -> Result
    ) throws(ImageError) -> Result {
        do {
            return try body()
        } catch {
            let isRelative = (try? name.path()).map { !$0.isAbsolute } ?? false
            throw ImageError(
                error.kind, path: name.description,
                "\(error.message) (the data file of \(image)"
                    + (isRelative ? ", a path from the working directory)" : ")"))
        }
    }
}
