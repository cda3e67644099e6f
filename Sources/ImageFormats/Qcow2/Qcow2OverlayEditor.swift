import DiskImage
import ImageStorage

/// Changes the relation of qcow2 images to their backing files.
struct Qcow2OverlayEditor: OverlayEditor {
    func prepareToRebase(
        _ storage: any WritableStorage, on backing: BackingName?
    ) async throws -> @Sendable () async throws -> Void {
        var header = try await Qcow2Header.read(from: storage, for: .checking)
        try header.requireWritable(storage.name)
        // A raw data file holds all of the disk.
        guard backing == nil || !header.isDataFileRaw else {
            throw ImageError.invalid("Invalid argument")
        }
        try header.setBacking(backing)
        return {
            var image = try await Qcow2WritableImage.damaged(storage)
            var new = image.header
            try new.setBacking(backing)
            try await image.rewriteHeader { [new] in $0 = new }
        }
    }

    func prepareToEmpty(
        _ storage: any WritableStorage, data: (any WritableStorage)?
    ) async throws -> @Sendable () async throws -> Void {
        let (image, refcounts) = try await Qcow2WritableImage.sound(
            storage, try await Qcow2Header.read(from: storage))
        return {
            var image = image
            var refcounts = refcounts
            try await image.empty(&refcounts)
            // Nothing leads there any more. Blocks that cannot be given back do no harm.
            if let data, !data.traits.isDevice {
                let end = min(data.size, image.geometry.virtualSize)
                try? await data.zero(0..<end, mayUnmap: true)
            }
        }
    }
}

extension Qcow2WritableImage {
    /// Drops all L2 tables of the active disk and what they lead to. Snapshots keep what they use.
    ///
    /// The L1 entries go first. Each of them is the old one or 0 at every moment, so the disk shows
    /// its own content or that of its backing file, cluster by cluster.
    ///
    /// - Throws: `ImageError`. The image is valid then, with leaked clusters at worst.
    mutating func empty(_ refcounts: inout Qcow2Refcounts) async throws {
        var tables: [HostOffset] = []
        for index in l1.indices {
            guard let table = try tableOffset(Int64(index)) else { continue }
            tables.append(table)
            l1[index] = 0
        }
        guard !tables.isEmpty else { return }
        try await clearUnknownFeatures()
        try await writeL1(0..<l1.count)
        try await writable.flush()
        for table in tables {
            let words = try await readTable(at: table)
            try await refcounts.release(clusters(of: words[...]))
            try await refcounts.release([table.bytes / geometry.clusterSize])
        }
        try await refcounts.releaseEnd()
    }
}

extension Qcow2Header {
    /// - Throws: `ImageError` in qemu-img's words if the header has no room for the names.
    mutating func setBacking(_ backing: BackingName?) throws(ImageError) {
        backingFile = backing?.name
        backingFormat = backing?.format
        guard backingFile?.bytes.count ?? 0 <= Self.maximumBackingNameLength else {
            throw .invalid("Invalid argument")
        }
        guard (try? serialized()) == nil else { return }
        // The names of features are of less use, and qemu leaves them out of small clusters.
        otherExtensions.removeAll { $0.type == ExtensionType.featureNames }
        guard (try? serialized()) != nil else {
            throw .invalid("No space left in the file header")
        }
    }
}
