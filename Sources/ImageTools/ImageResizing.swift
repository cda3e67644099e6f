import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// One `swimg resize`: changes the size of an image in place.
public struct ImageResizing: Sendable {
    public enum Change: Sendable, Equatable {
        /// The new size in bytes.
        case to(Int64)
        /// The difference in bytes; negative values shrink.
        case by(Int64)
    }

    /// The path of the file, or a description of a whole one.
    public var name: ImageName
    /// nil detects the format from the first bytes.
    public var format: ImageFormat?
    public var secrets = Secrets()
    public var change: Change
    /// Allows a smaller size; data after the new end is lost (`--shrink`).
    public var shrinks = false
    /// Preallocation of the added part.
    public var preallocation = Preallocation.off
    /// Called if no format was given and none was recognised, so that raw is assumed.
    public var onGuessedRaw: (@Sendable () -> Void)?

    public init(_ name: ImageName, change: Change) {
        self.name = name
        self.change = change
    }

    /// The new size is smaller, and `shrinks` is false.
    public struct ShrinkNotAllowed: Error {}

    /// - Throws: `ImageError`, `ShrinkNotAllowed` or `CancellationError`. After an error the image
    ///   is valid, and unchanged unless its header has been written.
    public func run() async throws {
        var image = ImageInPlace(name)
        image.access.options.secrets = secrets
        let place = try ImageDescription(name)?.place ?? name
        let driver = Storages.driver(for: place)
        guard driver.changesInPlace else {
            throw ImageError.invalid("Cannot resize \(driver.label) nodes")
        }
        let storage = try await name.opening { try driver.openInPlace(place, StorageAccess()) }
        let known: ImageFormat
        if let format {
            known = format
        } else {
            known = try await name.opening { try await ImageFormat.probe(storage) }
            if known.driver.isPlain { onGuessedRaw?() }
        }
        guard let resizer = known.driver.resizer else {
            throw ImageError.unsupported(
                storage.name, "Image format driver does not support resize")
        }
        try await image.naming { [image] in
            try await resizer.resize(
                storage, key: image.key(), preallocation: preallocation,
                openBacking: { try await image.openBacking($0, in: storage) },
                openData: { try ImageOpener().openDataInPlace(of: $0, at: place) },
                newSize: newSize)
        }
    }

    private func newSize(_ current: Int64) throws -> Int64 {
        let size: Int64
        switch change {
        case .to(let bytes): size = bytes
        case .by(let bytes):
            let (sum, overflow) = current.addingReportingOverflow(bytes)
            guard !overflow else { throw ImageError.tooLarge("the new size") }
            size = sum
        }
        guard try size.checkedAsDiskSize() > 0 else {
            throw ImageError.invalid("New image size must be positive")
        }
        if size <= current, preallocation != .off {
            throw ImageError.invalid("Preallocation can only be used for growing images")
        }
        if size < current, !shrinks { throw ShrinkNotAllowed() }
        return size
    }
}
