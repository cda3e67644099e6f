import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// An image that a verb changes where it stands.
public struct ImageInPlace: Sendable {
    public var name: ImageName
    /// nil detects the format from the first bytes.
    public var format: ImageFormat?
    public var access = StorageAccess()
    /// Called if no format was given and none was recognised, so that raw is assumed.
    public var onGuessedRaw: (@Sendable () -> Void)?

    public init(_ name: ImageName) { self.name = name }

    /// The path or export that holds the image, from which relative names in the image count.
    func place() throws(ImageError) -> ImageName {
        (try ImageDescription(name)?.place ?? name).withoutFilePrefix
    }

    /// Lets errors that keep the image from being opened name it as the command line does.
    func naming<Result>(_ body: () async throws -> Result) async throws -> Result {
        do {
            return try await body()
        } catch let error as ImageError where error.isOfOpening {
            return try await name.opening { throw error }
        }
    }

    /// The key to the image.
    func key() throws(ImageError) -> ImageKey {
        ImageOpener(access).key(try ImageDescription(name))
    }

    /// Opens the disk of the backing file `named`, or of the one that the image's description has
    /// in its place. Its data cannot be read without its secrets, which few changes need.
    ///
    /// - Throws: `ImageError`.
    func openBacking(
        _ named: BackingName, in storage: any Storage
    ) async throws -> any ImageSource {
        var opener = ImageOpener(access)
        opener.needsSecrets = false
        return try await opener.openChain(below: named, of: name, in: storage).disk
    }

    /// Opens the image for reading and writing.
    ///
    /// - Throws: `ImageError`; also for a part of a file, and on storages where nothing can be
    ///   changed in place.
    func open() async throws -> (storage: any WritableStorage, format: ImageFormat) {
        let described = try ImageDescription(name)
        guard described?.isWhole ?? true else {
            throw ImageError.unsupported(
                name.description, "an image that is a part of a file can only be read")
        }
        let place = described?.place ?? name
        let driver = Storages.driver(for: place)
        guard driver.changesInPlace else {
            throw ImageError.unsupported(
                name.description, "images on \(driver.label) cannot be changed in place")
        }
        let storage = try driver.openInPlace(place, access)
        let known = try await ImageOpener().knownFormat(
            format, of: storage, described: described)
        if format == nil, described?.format == nil, known.driver.isPlain { onGuessedRaw?() }
        return (storage, known)
    }

    /// Opens the data file for reading and writing.
    ///
    /// - Parameter image: as `open` has opened it.
    /// - Returns: nil if the image holds its data itself.
    /// - Throws: `ImageError`.
    func openData(of image: any Image) throws -> (any WritableStorage)? {
        try ImageOpener(access).openDataInPlace(
            of: image, at: try place(), described: try ImageDescription(name)?.dataFile)
    }
}
