import DiskImage
import ImageFormats
import ImageStorage
import NBDStorage

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
        guard !NBDStorage.isName(name) else {
            throw ImageError.invalid("Cannot resize NBD nodes")
        }
        let storage = try FileStorage.openExistingTarget(
            name.path(), cacheMode: .writeback)
        let known: ImageFormat
        if let format {
            known = format
        } else {
            known = try await ImageFormat.probe(storage)
            if known == .raw { onGuessedRaw?() }
        }
        switch known {
        case .raw:
            let current = storage.size.roundedUp(to: guestSectorSize)
            try await resizeRaw(storage, from: current, to: try newSize(current))
        case .qcow2:
            do {
                try await resizeQcow2(storage)
            } catch let error as ImageError {
                throw error.naming(storage.name)
            }
        }
    }

    private func resizeQcow2(_ storage: FileStorage) async throws {
        let header = try await Qcow2Source(storage).header
        let backing = try await ImageOpener().openBacking(of: header, at: name, in: storage)
        let size = try newSize(header.geometry.virtualSize)
        var resizer = try await Qcow2Resizer(
            storage: storage, header: header, backing: backing)
        try await resizer.resize(to: size, preallocation: preallocation)
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

    private func resizeRaw(
        _ storage: FileStorage, from current: Int64, to size: Int64
    ) async throws {
        if storage.traits.isDevice {
            guard preallocation == .off else {
                throw ImageError.invalid(
                    "Preallocation mode '\(preallocation.rawValue)' unsupported for this "
                        + "non-regular file")
            }
            guard size == current else { throw ImageError.invalid("Cannot resize device files") }
            return
        }
        guard preallocation != .metadata else {
            throw ImageError.invalid("Unsupported preallocation mode: metadata")
        }
        let old = storage.size
        if preallocation.takesBlocks { try storage.requireSpace(size - old) }
        try await storage.truncate(to: size)
        do {
            if preallocation.takesBlocks { try storage.allocate(old..<size, preallocation) }
            if preallocation == .full { try await storage.writeZeros(old..<size) }
        } catch {
            try? await storage.truncate(to: old)
            throw error
        }
        try await storage.flush()
    }
}

extension ImageError {
    /// The name of a backing file stands in an image, so an error has to say in which one.
    fileprivate func naming(_ image: String) -> ImageError {
        guard let path, path != image, !message.contains("(the backing file of ") else {
            return self
        }
        return ImageError(kind, path: path, "\(message) (below \(image))")
    }
}
