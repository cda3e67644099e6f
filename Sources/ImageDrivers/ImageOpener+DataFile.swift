import DiskImage
import ImageFormats
import ImageStorage

// Data files: files that hold the data of an image whose own file holds its tables only.
extension ImageOpener {
    /// Opens the data file of an image.
    ///
    /// As in qemu, a name in the image is a path whatever it looks like, and a relative path counts
    /// from the working directory.
    ///
    /// - Parameters:
    ///   - described: data file of the image's description, which the name in the image yields to.
    ///   - isTyped: whether a person typed that description.
    /// - Returns: nil if the image holds its data itself.
    /// - Throws: `ImageError`, what the gate throws.
    func openData(
        of image: any Image, at place: ImageName, described: ImageName?, isTyped: Bool
    ) throws -> (storage: any Storage, name: ImageName)? {
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
        let isTyped = isTyped && described != nil
        if !isTyped { try backingGate(name, place) }
        let data = try Self.blaming(dataOf: place, for: name) { () throws(ImageError) in
            try openPlace(name, isTyped: isTyped)
        }
        try Self.check(dataFile: data.file, of: image.storage)
        return (data, name)
    }

    /// Opens the data file that an image names, to be changed in place.
    ///
    /// - Throws: `ImageError`, what the gate throws.
    public func openDataInPlace(
        _ path: HostPath, of storage: any Storage, at place: ImageName
    ) throws -> any WritableStorage {
        let name = path.name
        try backingGate(name, place)
        // Before it is opened: its lock would only tell that the file is in use.
        try Self.check(dataFile: FileIdentity(path: path), of: storage)
        return try Self.blaming(dataOf: place, for: name) { () throws(ImageError) in
            try Storages.driver(for: name, isTyped: false).openInPlace(name, access)
        }
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
