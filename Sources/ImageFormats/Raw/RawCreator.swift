import DiskImage
import Glibc
import ImageStorage

/// Creates raw images.
struct RawCreator: ImageCreator {
    let canCompress = false

    let options: [OptionDescription] = [
        .size, .noCopyOnWrite,
        OptionDescription(
            "preallocation", .text, "Preallocation mode (allowed values: off, falloc, full)",
            isOfFile: true),
        .extentSizeHint,
    ]

    func newImage(_ options: TypedOptions) throws(ImageError) -> any NewImage {
        NewRawImage(
            parameters: try ImageParameters(options) { name throws(ImageError) in
                let mode = try Preallocation(option: name)
                guard mode != .metadata else {
                    throw .invalid("Unsupported preallocation mode: metadata")
                }
                return mode
            })
    }

    func existingImage(_ image: any Image, leavesBacking: Bool) -> any WrittenImage {
        ExistingRawImage(leavesBacking: leavesBacking)
    }

    func measure(_ disk: MeasuredDisk, _ options: TypedOptions) -> MeasuredSize {
        MeasuredSize(required: disk.size, fullyAllocated: disk.size)
    }
}

private struct ExistingRawImage: WrittenImage {
    let leavesBacking: Bool

    func makeTarget(
        on storage: any WritableStorage, size: Int64, _ settings: TargetSettings
    ) -> any ImageTarget {
        RawTarget(
            storage: storage, minSparse: Int(settings.minSparse),
            looksForZeros: settings.looksForZeros, isThere: true, leavesBacking: leavesBacking,
            readsAsZero: settings.readsAsZero)
    }
}

private struct NewRawImage: NewImage {
    let parameters: ImageParameters

    private var preallocation: Preallocation { parameters.preallocation }

    func makeTarget(
        on storage: any WritableStorage, size: Int64, _ settings: TargetSettings
    ) async throws -> any ImageTarget {
        if settings.isThere {
            guard storage.size >= size else {
                throw ImageError(
                    .invalid, path: storage.name,
                    "is smaller (\(storage.size) bytes) than the source (\(size) bytes)")
            }
        } else {
            try await storage.truncate(to: size)
            if preallocation.takesBlocks {
                try storage.requireSpace(size)
                try storage.allocate(0..<size, preallocation)
            }
        }
        return RawTarget(
            storage: storage, minSparse: Int(settings.minSparse),
            looksForZeros: settings.looksForZeros, isThere: settings.isThere,
            readsAsZero: settings.readsAsZero)
    }

    /// Length in bytes of the part of a new file that is always written.
    private static let firstBlock: Int64 = 4096

    func makeEmpty(on storage: any WritableStorage, size: Int64) async throws {
        if storage.traits.isDevice { return try await clearDevice(storage, size) }
        do {
            try await storage.truncate(to: size)
        } catch let error as ImageError where error.kind == .system(errno: EFBIG) {
            throw ImageError.invalid("The image size is too large for file format 'raw'")
        }
        if preallocation.takesBlocks {
            try storage.requireSpace(size)
            try storage.allocate(0..<size, preallocation)
        }
        // As in qemu-img, the first block is always written, so that a program that opens the file
        // with O_DIRECT can find out the alignment by reading.
        let written = preallocation == .full ? size : min(Self.firstBlock, size)
        try await storage.writeZeros(0..<written)
    }

    /// Clears the first sector of a device, by which an old image there would be recognized.
    private func clearDevice(_ storage: any WritableStorage, _ size: Int64) async throws {
        guard preallocation == .off else {
            throw ImageError.invalid("Unsupported preallocation mode '\(preallocation.rawValue)'")
        }
        guard size <= storage.size else { throw ImageError.invalid("Cannot grow device files") }
        try await storage.zero(0..<min(guestSectorSize, storage.size), mayUnmap: false)
    }
}
