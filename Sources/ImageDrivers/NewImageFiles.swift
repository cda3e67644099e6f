import DiskImage
import ImageFormats
import ImageStorage

/// The files of a new image while they are written: its own and, if it has one, its data file. Both
/// are begun, committed and abandoned together.
public struct NewImageFiles: Sendable {
    private let image: any StorageTarget
    private let data: (any StorageTarget)?

    public var storage: any WritableStorage { image.storage }
    /// The storage of the data file; nil if the image has none.
    public var dataStorage: (any WritableStorage)? { data?.storage }

    /// Begins the files.
    ///
    /// - Throws: `ImageError`; also if both names lead to one file.
    public init(
        beginning name: ImageName, _ parameters: ImageParameters, _ request: TargetRequest
    ) throws {
        let driver = Storages.driver(for: name)
        guard let path = parameters.dataFile else {
            image = try driver.beginTarget(name, request)
            data = nil
            return
        }
        guard !path.bytes.isEmpty else {
            throw ImageError.invalid("Expected data file name, got empty string")
        }
        if Storages.isPath(name, isTyped: true), FileDriver.isOneFile(try name.path(), path) {
            throw ImageError(
                .invalid, path: path.description,
                "cannot be the data file, because it is the image itself")
        }
        var dataRequest = request
        dataRequest.manner = .create
        let target = try driver.beginTarget(name, request)
        do {
            data = try FileDriver().beginTarget(path.name, dataRequest)
        } catch {
            target.abandon()
            throw error
        }
        image = target
    }

    /// Gives both files their names, the data file first: an image is never without its data.
    public func commit() async throws {
        if let data {
            // An error of the image should come before its data file has a name.
            try await image.storage.flush()
            try await data.commit()
        }
        try await image.commit()
    }

    public func abandon() {
        image.abandon()
        data?.abandon()
    }
}
