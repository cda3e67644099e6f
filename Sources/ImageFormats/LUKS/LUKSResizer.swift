import DiskImage
import ImageStorage

/// Resizes LUKS images. As in qemu-img, what the guest reads in new space is not defined.
struct LUKSResizer: ImageResizer {
    func resize(
        _ storage: any WritableStorage, key: ImageKey, preallocation: Preallocation,
        openBacking: (BackingName) async throws -> any ImageSource,
        openData: (any Image) throws -> (any WritableStorage)?,
        newSize: (_ current: Int64) throws -> Int64
    ) async throws {
        // As in qemu-img, the passphrase has to be right.
        _ = try await LUKSImage(storage, key: key)
        let start = try await LUKSHeader.read(from: storage).payloadOffset
        try await RawResizer().resize(
            storage, key: key, preallocation: preallocation, openBacking: openBacking,
            openData: openData
        ) { current in
            let size = try newSize(current - start)
            guard size % guestSectorSize == 0 else {
                throw ImageError.invalid("The new size must be a multiple of 512")
            }
            guard size <= largestDiskSize - start else { throw ImageError.tooLarge("the new size") }
            return start + size
        }
    }
}
