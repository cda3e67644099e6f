import DiskImage
import ImageStorage

/// Resizes raw files.
struct RawResizer: ImageResizer {
    func resize(
        _ storage: any WritableStorage, key: ImageKey, preallocation: Preallocation,
        openBacking: (BackingName) async throws -> any ImageSource,
        openData: (any Image) throws -> (any WritableStorage)?,
        newSize: (_ current: Int64) throws -> Int64
    ) async throws {
        let current = storage.size.roundedUp(to: guestSectorSize)
        let size = try newSize(current)
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
