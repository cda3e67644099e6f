import DiskImage
import ImageFormats
import ImageStorage

/// The part of a conversion for which everything is open: makes the target in its format and fills it.
struct TargetJob {
    let conversion: Conversion
    let parameters: ImageParameters
    let content: ConcatenatedSource
    /// Of the first source: what it does not hold itself, a target with a backing file need not either.
    let topLayer: any ImageSource
    let backing: Qcow2Options.Backing?
    /// The image whose properties the target is to have.
    let existing: ExistingQcow2?

    func write(to storage: FileStorage) async throws {
        let size = try virtualSize()
        let source = try padded(to: size)
        let target = try await makeTarget(storage, size)
        var pipeline = Pipeline(
            workers: conversion.workers, writesInOrder: conversion.writesInOrder,
            storesZeros: conversion.minSparse == 0)
        if let report = conversion.onProgress {
            pipeline.onProgress = { done in report(done, size) }
        }
        let extents: any ImageSource =
            backing == nil ? source : try ConcatenatedSource([topLayer])
        try await pipeline.copy(from: source, extents: extents, to: target)
    }

    private func virtualSize() throws(ImageError) -> Int64 {
        guard let asked = parameters.size?.roundedUp(to: guestSectorSize) else {
            return content.virtualSize
        }
        guard asked >= content.virtualSize else {
            throw .invalid(
                "the size asked for (\(asked) bytes) is smaller than the source "
                    + "(\(content.virtualSize) bytes)")
        }
        return asked
    }

    private func padded(to size: Int64) throws(ImageError) -> any ImageSource {
        guard size > content.virtualSize else { return content }
        return try ConcatenatedSource([
            content, ZeroSource(virtualSize: size - content.virtualSize),
        ])
    }

    private func makeTarget(_ storage: FileStorage, _ size: Int64) async throws -> any ImageTarget {
        let isFresh = storage.traits.readsAsZero
        if isFresh, conversion.minSparse == 0 { try storage.requireSpace(size) }
        switch conversion.targetFormat {
        case .raw:
            if conversion.skipsCreation {
                guard storage.size >= size else {
                    throw ImageError(
                        .invalid, path: storage.name,
                        "is smaller (\(storage.size) bytes) than the source (\(size) bytes)")
                }
            } else {
                try await storage.truncate(to: size)
            }
            return RawTarget(
                storage: storage, minSparse: Int(conversion.minSparse),
                readsAsZero: isFresh || conversion.targetIsZero)
        case .qcow2:
            var options = existing?.options ?? parameters.qcow2
            options.backing = backing ?? options.backing
            let target = try Qcow2Target(
                storage: storage, virtualSize: size, options: options,
                compress: conversion.compress, minSparse: Int(conversion.minSparse))
            try await target.invalidateOldHeader()
            return target
        }
    }
}
