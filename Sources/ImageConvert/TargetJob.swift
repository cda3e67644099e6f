import Concurrency
import DiskImage
import ImageFormats
import ImageStorage
import Synchronization

/// The part of a conversion after all images are open: makes the target in its format and fills it.
struct TargetJob {
    let conversion: Conversion
    let input: CopyInput
    let image: any WrittenImage
    let parameters: ImageParameters
    /// Name of the data file of an existing image; nil if it holds its data itself.
    let existingData: ImageName?
    /// nil copies none.
    let bitmaps: BitmapCopy?
    let request: TargetRequest
    /// Number of concurrent requests that keep the source busy.
    let requestsInFlight: Int
    /// Best length of such a request in bytes.
    let requestSize: Int64
    /// All storages that are read.
    let sources: [any Storage]

    /// A fully preallocated target stores every byte, zeros too, so each is written once.
    private var minSparse: Int64 {
        parameters.preallocation == .full ? 0 : conversion.scannedMinSparse
    }

    private var isHashed: Bool {
        conversion.onDigest != nil || conversion.expectedDigest != nil
    }

    private var algorithm: DigestAlgorithm {
        conversion.expectedDigest?.algorithm ?? conversion.digestAlgorithm
    }

    /// Chunks are hashed one after the other.
    private var isHashedInOrder: Bool { isHashed && algorithm == .sha256 }

    /// - Parameters:
    ///   - storage: of the target.
    ///   - data: storage of the target's data file; nil if the target holds its data itself.
    func write(to storage: any WritableStorage, data: (any WritableStorage)? = nil) async throws {
        // `-S 0` asks for blocks of the target's own, and a shared hole would stay a hole.
        let mayShare =
            conversion.sharesBlocks && !conversion.salvages && minSparse > 0
            && !parameters.preallocation.takesBlocks
        (data ?? storage).stopSharing(unlessWith: mayShare ? sources : [])
        let whole = try input.padded(to: virtualSize())
        let input = try await fitted(whole, into: storage)
        let size = input.isOpenEnded ? 0 : input.content.virtualSize
        if conversion.verifies { try checkVerifiable(storage, input.content.virtualSize) }
        let target = try await makeTarget(storage, data, size)
        var pipeline = makePipeline(from: input, to: target, on: data ?? storage)
        if isHashed {
            pipeline.digests.append(
                try digestStage(
                    skipped: target.traits.hasBacking ? input.content : nil,
                    zerosBehind: whole.content.virtualSize - input.content.virtualSize))
        }
        let checksum = Mutex("")
        if conversion.verifies {
            pipeline.digests.append(
                try DigestStage(form: .checksum) { hash in
                    checksum.withLock { $0 = hash.hexadecimal }
                })
        }
        if let planned = target as? any PlannedTarget {
            guard !input.isOpenEnded else {
                throw ImageError.unsupported(
                    storage.name,
                    "a qcow2 image cannot be written to a pipe from a source whose size only its "
                        + "end tells")
            }
            try await planned.begin(try await pipeline.plan(input.extents, for: target))
        }
        try await pipeline.copy(from: input.content, extents: input.extents, to: target)
        try await bitmaps?.write(to: storage)
        if conversion.verifies {
            // Only now is the size of an open-ended disk known.
            try checkVerifiable(storage, input.content.virtualSize)
            try await verify(storage, checksum.withLock { $0 })
        }
    }

    /// The engine with the limits that suit the storages of both ends.
    ///
    /// - Parameter storage: takes the data.
    private func makePipeline(
        from input: CopyInput, to target: any ImageTarget, on storage: any WritableStorage
    ) -> Pipeline {
        var pipeline = Pipeline(
            writesInOrder: conversion.writesInOrder,
            storesZeros: minSparse == 0)
        pipeline.mostWorkers = conversion.mostWorkers
        pipeline.memory = conversion.memory
        pipeline.bytesPerSecond = conversion.bytesPerSecond
        if sources.contains(where: \.traits.isStream) {
            pipeline.memory = min(pipeline.memory, StreamStorage.inFlight)
        }
        pipeline.readMeters = sources.map(\.readMeter)
        pipeline.checkSource = { [sources] in
            for source in sources { try await source.finishReading() }
        }
        pipeline.writeMeter = storage.writeMeter
        let distant = storage.traits.requestsInFlight
        let wanted = distant + requestsInFlight
        let cores = IOExecutor.coreCount
        if wanted > 0 {
            if distant == 0 || requestsInFlight == 0 {
                // While a worker scans and writes to a file, a few more have to keep the server
                // busy. One for each core would leave some of them without work.
                if wanted > cores { pipeline.baseWorkers = wanted + max(1, wanted / 4) }
            } else {
                // While it waits for one server, the other has nothing to do for it. More than
                // these would only want buffers, unless there is something to compute.
                let computing = target.compresses ? Int.max : cores
                pipeline.baseWorkers = max(min(pipeline.baseWorkers, computing), wanted)
            }
            pipeline.chunkSize = max(requestSize, storage.traits.requestSize)
            pipeline.readsAhead = sources.contains { $0.traits.readsAhead }
        } else if storage.traits.writesOneByOne || conversion.writesInOrder, !isHashedInOrder {
            // A cluster that takes long to compress delays the placing of those behind it.
            pipeline.baseWorkers = target.compresses ? 2 * cores : cores + 2
        }
        // Order matters for disks that turn and files that grow; a server gets all requests at
        // once.
        if distant > 0 { pipeline.writesInOrder = false }
        if storage.traits.isStream {
            pipeline.writesInOrder = true
            pipeline.writesOverlap = false
        }
        if let report = conversion.onProgress {
            let (size, isOpenEnded) = (input.content.virtualSize, input.isOpenEnded)
            pipeline.onProgress = { [sources] done in
                guard isOpenEnded else { return report(done, size) }
                let stream = sources.lazy.compactMap(\.streamProgress).first
                if let stream { report(stream.done, stream.total) }
            }
        }
        return pipeline
    }

    /// Refuses a target that cannot be verified.
    private func checkVerifiable(
        _ storage: any WritableStorage, _ size: Int64
    ) throws(ImageError) {
        guard storage.traits.hasChecksum else {
            throw .unsupported(storage.name, "the server computes no checksums (--verify)")
        }
        guard storage.size <= size else {
            throw .unsupported(
                storage.name,
                "cannot be verified: of its \(storage.size) bytes only \(size) are written")
        }
    }

    /// Compares the checksum of what the storage holds with that of what was converted.
    private func verify(_ storage: any WritableStorage, _ expected: String) async throws {
        try await storage.flush()
        let found = try await storage.checksum(blockSize: BlockHashForm.checksum.blockSize)
        guard found == expected else {
            throw ImageError(
                .invalid, path: storage.name,
                "the checksum of the written disk is \(found), of what was converted \(expected)")
        }
    }

    /// - Parameters:
    ///   - skipped: the content of the target's backing file, a part of the disk, too.
    ///   - zerosBehind: number of zeros that belong to the disk and have no place in the target.
    private func digestStage(
        skipped: (any ImageSource)?, zerosBehind: Int64
    ) throws(ImageError) -> DigestStage {
        try DigestStage(algorithm, skipped: skipped, zerosBehind: zerosBehind) {
            [conversion] digest in
            if let expected = conversion.expectedDigest, digest != expected {
                throw ImageError(
                    .invalid, path: conversion.target.description,
                    "the digest of what was converted is \(digest), not \(expected)")
            }
            conversion.onDigest?(digest)
        }
    }

    /// Fits the source to an existing raw target that ends within the source's last sector. Zeros
    /// behind its end are left out, because every reader pads a raw disk with them; for any other
    /// data the file grows to the whole sector.
    private func fitted(
        _ input: CopyInput, into storage: any WritableStorage
    ) async throws -> CopyInput {
        let size = input.content.virtualSize
        let end = storage.size
        guard conversion.targetFormat.driver.isPlain, isThere(storage), end < size,
            end.roundedUp(to: guestSectorSize) == size
        else { return input }
        var tail = try IOBuffer(byteCount: Int(size - end))
        var bytes = tail.mutableBytes
        try await input.content.read(into: &bytes, at: end)
        if ZeroScan.isZero(tail.bytes) {
            return CopyInput(
                content: SliceSource(input.content, 0..<end),
                extents: SliceSource(input.extents, 0..<end))
        }
        if !storage.traits.isDevice { try await storage.truncate(to: size) }
        return input
    }

    /// Whether the target existed before this conversion and is written as it stands.
    private func isThere(_ storage: any WritableStorage) -> Bool {
        conversion.skipsCreation || storage.traits.isRemote
    }

    private func virtualSize() throws(ImageError) -> Int64 {
        let size = input.content.virtualSize
        guard let asked = parameters.size?.roundedUp(to: guestSectorSize) else { return size }
        guard asked >= size else {
            throw .invalid(
                "the size asked for (\(asked) bytes) is smaller than the source (\(size) bytes)")
        }
        return asked
    }

    private func makeTarget(
        _ storage: any WritableStorage, _ data: (any WritableStorage)?, _ size: Int64
    ) async throws -> any ImageTarget {
        // The tables of an existing image tell what an empty data file means.
        let isFresh = existingData == nil && (data ?? storage).traits.readsAsZero
        if isFresh, minSparse == 0 { try (data ?? storage).requireSpace(size) }
        // A failure is not reported: nothing depends on the attributes, and callers take a line on
        // stderr for an error.
        for storage in [storage, data].compactMap({ $0 }) where storage.traits.readsAsZero {
            _ = storage.apply(parameters.attributes)
        }
        var settings = TargetSettings(minSparse: minSparse)
        settings.compress = conversion.compress
        settings.looksForZeros = conversion.minSparse != nil || minSparse == 0
        settings.isThere = isThere(storage)
        settings.readsAsZero = isFresh || conversion.targetIsZero
        var image = image
        if let data { image.setData(data) }
        return try await image.makeTarget(on: storage, size: size, settings)
    }
}
