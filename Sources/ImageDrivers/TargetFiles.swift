import DiskImage
import ImageFormats
import ImageStorage

/// The files of an image while they are written: its own and, if it has one, its data file. Both
/// are begun, committed and abandoned together.
public struct TargetFiles: Sendable {
    private let image: any StorageTarget
    private let data: (any StorageTarget)?

    public var storage: any WritableStorage { image.storage }
    /// The storage of the data file; nil if the image has none.
    public var dataStorage: (any WritableStorage)? { data?.storage }

    /// Begins the files of a new image.
    ///
    /// - Throws: `ImageError`; also if both names lead to one file.
    public init(
        beginning name: ImageName, _ parameters: ImageParameters, _ request: TargetRequest
    ) throws {
        guard let path = parameters.dataFile else {
            try self.init(name, data: nil, request)
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
        try self.init(name, data: path.name, request)
    }

    /// Opens the files of an existing image to be written as they stand.
    ///
    /// - Parameters:
    ///   - data: name of the data file; nil if the image has none.
    ///   - isTyped: whether a person typed the name of the image.
    /// - Throws: `ImageError`.
    public init(
        into name: ImageName, data: ImageName?, _ request: TargetRequest, isTyped: Bool = true
    ) throws {
        try self.init(name, data: data, request, isTyped: isTyped)
    }

    private init(
        _ name: ImageName, data dataName: ImageName?, _ request: TargetRequest,
        isTyped: Bool = true
    ) throws {
        let target = try Storages.driver(for: name, isTyped: isTyped).beginTarget(name, request)
        do {
            data = try dataName.map {
                try Storages.driver(for: $0, isTyped: false).beginTarget($0, request)
            }
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
