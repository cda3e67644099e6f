import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// One `resize`: gives an image another size, where it is.
public struct ImageResizing: Sendable {
    public enum Change: Sendable, Equatable {
        /// To this size, in bytes.
        case to(Int64)
        /// By so many bytes; negative ones shrink.
        case by(Int64)
    }

    public var name: ImageName
    /// nil looks at the first bytes.
    public var format: ImageFormat?
    public var change: Change
    /// What lies beyond the new end may be lost (`--shrink`).
    public var shrinks = false
    /// Of what is new.
    public var preallocation = Preallocation.off
    /// Told when the format was not given and the image has none that can be recognised.
    public var onGuessedRaw: (@Sendable () -> Void)?

    public init(_ name: ImageName, change: Change) {
        self.name = name
        self.change = change
    }

    /// The new size is smaller, and nobody said that this is meant.
    public struct ShrinkNotAllowed: Error {}

    /// - Throws: `ImageError`, `ShrinkNotAllowed` or `CancellationError`. An image that was being resized
    ///   is valid in any case, and what it was unless its header has been written.
    public func run() async throws {
        let driver = Storages.driver(for: name)
        guard driver.changesInPlace else {
            throw ImageError.invalid("Cannot resize \(driver.label) nodes")
        }
        let storage = try driver.openInPlace(name, StorageAccess())
        let known: ImageFormat
        if let format {
            known = format
        } else {
            known = try await ImageFormat.probe(storage)
            if known.driver.isPlain { onGuessedRaw?() }
        }
        guard let resizer = known.driver.resizer else {
            throw ImageError.unsupported(
                storage.name, "Image format driver does not support resize")
        }
        try await resizer.resize(
            storage, preallocation: preallocation,
            openBacking: { backing in
                try await ImageOpener().openBacking(backing, of: name, in: storage)
            },
            newSize: newSize)
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
        guard try checkedDiskSize(size) > 0 else {
            throw ImageError.invalid("New image size must be positive")
        }
        if size <= current, preallocation != .off {
            throw ImageError.invalid("Preallocation can only be used for growing images")
        }
        if size < current, !shrinks { throw ShrinkNotAllowed() }
        return size
    }
}
