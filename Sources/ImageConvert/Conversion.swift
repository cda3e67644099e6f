import DiskImage
import ImageFormats
import ImageStorage
import NBDStorage

/// One `swimg convert`: what to read, what to write, and how.
///
/// ```swift
/// var conversion = Conversion(sources: ["disk.qcow2"], target: "disk.raw")
/// conversion.targetFormat = .raw
/// try await conversion.run()
/// ```
public struct Conversion: Sendable {
    /// Paths, or names of NBD exports (`NBDAddress`, `NBDServerCommand`); several guest disks are joined
    /// to one.
    public var sources: [ImageName]
    public var target: ImageName
    /// nil finds it out from the first bytes of each source.
    public var sourceFormat: ImageFormat?
    public var targetFormat = ImageFormat.raw
    public var options = CreationOptions()
    /// The number of chunks that may be on their way; nil for as many as help.
    public var workers: Int?
    /// The limit for the buffers of all chunks together, in bytes.
    public var memory: Int64 = Pipeline.defaultMemory
    /// What a chunk brings to be written waits for those before it; false is `-W`.
    public var writesInOrder = true
    public var compress = false
    /// Runs of zeros of at least this many bytes are not stored; 0 stores everything. nil is 4096
    /// where data has to be read in any case: what a raw target can share with a source that has
    /// holes is not looked at.
    public var minSparse: Int64?
    /// Share blocks with the source where the file system can, instead of copying them.
    public var sharesBlocks = true
    /// Write into an existing target (`-n`).
    public var skipsCreation = false
    /// What the existing target holds reads as zeros.
    public var targetIsZero = false
    public var sourceCacheMode = CacheMode.writeback
    public var targetCacheMode = CacheMode.unsafe
    /// Read images that somebody else writes to (`-U`).
    public var shareForced = false
    /// How NBD servers are used.
    public var nbd = NBDOptions()
    /// The source as it was when this internal snapshot was taken (`-l`).
    public var snapshot: SnapshotName?
    /// The target lies on this file, and so does the source (`-B`); its format (`-F`).
    public var backingFile: ImageName?
    public var backingFormat: String?
    /// The part of the source that is copied; nil: all of it.
    public var slice: BlockSlice?
    /// How the digest is computed, if one is asked for and none is expected.
    public var digestAlgorithm = DigestAlgorithm.blkhash
    /// Told the digest of the guest disk once all of it has passed by, before the target gets its
    /// name.
    public var onDigest: (@Sendable (_ digest: DiskDigest) -> Void)?
    /// The conversion fails if the digest is another one.
    public var expectedDigest: DiskDigest?
    /// Told what a person should know though it is no failure.
    public var onWarning: (@Sendable (_ message: String) -> Void)?
    /// Told how far the conversion is, in bytes of the guest disk, from any task.
    public var onProgress: (@Sendable (_ done: Int64, _ total: Int64) -> Void)?

    public static let workerRange = 1...64
    public static let largestMinSparse: Int64 = 16 << 20
    private static let defaultMinSparse: Int64 = 4096

    /// `minSparse` as it counts where data is read.
    var scannedMinSparse: Int64 { minSparse ?? Self.defaultMinSparse }

    public init(sources: [ImageName], target: ImageName) {
        self.sources = sources
        self.target = target
    }

    /// Converts. The target appears under its name when it is whole, and not at all otherwise.
    ///
    /// - Throws: `ImageError`, or `CancellationError` if the task was cancelled.
    public func run() async throws {
        if let described = try ImageDescription(target) {
            return try await self.into(described).run()
        }
        let parameters = try checkedParameters()
        var opener = ImageOpener(
            cacheMode: sourceCacheMode, shareForced: shareForced, nbd: nbd)
        opener.snapshot = snapshot
        var opened: [OpenedImage] = []
        for source in sources {
            opened.append(try await opener.open(source, format: sourceFormat))
        }
        opener.snapshot = nil
        var input = try input(opened, parameters)
        var files = opened.flatMap(\.files)
        var created = parameters.qcow2
        var keepsOld = false
        if skipsCreation, targetFormat == .qcow2 {
            let existing = try await ExistingQcow2.open(target, opener)
            let leavesBacking = parameters.backingFile != nil
            keepsOld = existing.isNeeded(under: input, leavesBacking: leavesBacking)
            input = try existing.under(input, leavesBacking: leavesBacking, path: target)
            created = existing.options
            files += existing.filesBelow
        } else if let backing = try await openBacking(parameters, opener) {
            created.backing = backing.options
            files += backing.image.files
        }

        var conversion = self
        // Every byte is to be written, so each is written once: with what belongs there.
        if parameters.preallocation == .full { conversion.minSparse = 0 }
        try created.check()
        let job = TargetJob(
            conversion: conversion, input: input, parameters: parameters, qcow2: created,
            requestsInFlight: opened.map(\.requestsInFlight).max() ?? 0,
            requestSize: opened.map(\.requestSize).max() ?? 0,
            sources: opened.flatMap { $0.layers.map(\.storage) })
        var targetNBD = nbd
        targetNBD.writesThrough = targetCacheMode.isSynchronous
        // A raw export may be written back to itself: each range is read before it is written. Where a range comes from
        // somewhere else in it, that is not so.
        let isCopyInPlace =
            targetFormat == .raw && opened.map(\.format) == [.raw] && slice == nil
        if NBDStorage.isName(target), sources.contains(target), !isCopyInPlace {
            throw ImageError.invalid("the target '\(target)' is also the source")
        }
        if let export = try NBDStorage.open(target, targetNBD, forWriting: true) {
            guard !keepsOld else {
                throw ImageError.unsupported(
                    export.name, "cannot keep the old content beside the new one on an export")
            }
            try await job.write(to: export)
            return try await export.flush()
        }
        let path = try target.path()
        let file =
            skipsCreation && targetFormat == .raw
            ? try TargetFile.openExisting(
                path, cacheMode: targetCacheMode, protecting: Set(files))
            : try TargetFile.create(
                path, cacheMode: targetCacheMode, protecting: Set(files), keepsOld: keepsOld)
        do {
            try await job.write(to: file.storage)
            try await file.commit()
        } catch {
            file.abandon()
            throw error
        }
    }

    /// All sources as one disk. A target with a backing file needs only what the source's top layer
    /// does not leave to a backing file of its own.
    private func input(
        _ opened: [OpenedImage], _ parameters: ImageParameters
    ) throws(ImageError) -> CopyInput {
        let content = try sliced(ConcatenatedSource(opened.map(\.source)))
        guard parameters.backingFile != nil else {
            return CopyInput(content: content, extents: content)
        }
        return CopyInput(
            content: content, extents: try ConcatenatedSource(opened.map(\.ownLayer)))
    }

    private func sliced(_ source: ConcatenatedSource) throws(ImageError) -> ConcatenatedSource {
        guard let slice else { return source }
        guard let range = slice.range(of: source.virtualSize) else {
            onWarning?("\(sources[0]): cannot skip to specified offset")
            return try ConcatenatedSource([])
        }
        return try ConcatenatedSource([SliceSource(source, range)])
    }

    /// Finds what contradicts itself before anything is opened.
    private func checkedParameters() throws(ImageError) -> ImageParameters {
        guard !sources.isEmpty else { throw .invalid("a source is needed") }
        guard snapshot == nil || sources.count == 1 else {
            throw .invalid("No support for concatenating multiple snapshot")
        }
        guard workers.map(Self.workerRange.contains) ?? true else {
            throw .invalid("the number of workers (-m) must be between 1 and 64")
        }
        guard scannedMinSparse % 512 == 0,
            (0...Self.largestMinSparse).contains(scannedMinSparse)
        else {
            throw .invalid(
                "the buffer size for sparse output (-S) must be a multiple of 512 up to 16777216")
        }
        if skipsCreation, !options.isEmpty {
            throw .invalid("-o has no effect when skipping image creation (-n)")
        }
        if targetIsZero, !skipsCreation { throw .invalid("--target-is-zero needs -n") }
        if compress, targetFormat == .raw {
            throw .invalid("compression is not supported for format 'raw'")
        }
        var parameters: ImageParameters
        do {
            parameters = try ImageParameters(options, for: targetFormat)
        } catch {
            throw ImageError(
                error.kind, path: target.description,
                "error while converting \(targetFormat.rawValue): \(error.message)")
        }
        if compress, parameters.preallocation != .off {
            throw .invalid("Compression and preallocation not supported at the same time")
        }
        parameters.backingFile = backingFile ?? parameters.backingFile
        parameters.backingFormat = backingFormat ?? parameters.backingFormat
        if parameters.backingFile == nil, parameters.backingFormat != nil {
            throw .invalid("a backing format (-F) needs a backing file (-B)")
        }
        if parameters.backingFile != nil {
            if targetFormat == .raw {
                throw .invalid("a backing file is not supported for format 'raw'")
            }
            if sources.count > 1 {
                throw .invalid("a backing file cannot be used with several sources")
            }
            if parameters.preallocation != .off {
                throw .invalid(
                    parameters.qcow2.extendedL2
                        ? "preallocation of a target with a backing file is not supported yet"
                        : "Backing file and preallocation can only be used at the same time if "
                            + "extended_l2 is on")
            }
            if parameters.backingFormat == nil {
                throw .invalid("the use of a backing file needs its format (-F)")
            }
        }
        return parameters
    }

    /// The same, with the target's plain name in place of its description.
    private func into(_ described: ImageDescription) throws(ImageError) -> Conversion {
        guard skipsCreation else {
            throw .invalid("a target that is described (json:) needs -n")
        }
        guard described.isWhole else {
            throw .unsupported(described.place.description, "a part of a file can only be read")
        }
        var result = self
        result.target = described.place
        if let format = described.format { result.targetFormat = format }
        return result
    }

    /// The backing file has to be looked at: behind its end the target reads as zeros.
    private func openBacking(
        _ parameters: ImageParameters, _ opener: ImageOpener
    ) async throws -> (image: OpenedImage, options: Qcow2Options.Backing)? {
        guard let name = parameters.backingFile, let formatName = parameters.backingFormat else {
            return nil
        }
        guard let format = ImageFormat(rawValue: formatName) else {
            throw ImageError.invalid("unknown backing format '\(formatName)'")
        }
        let backing = try ImageOpener.backingName(name, namedBy: target)
        // Nothing is read but its size: it may be the disk of a running machine.
        var opener = opener
        opener.shareForced = true
        let image = try await opener.open(backing, format: format)
        return (
            image,
            Qcow2Options.Backing(
                file: name, format: formatName, virtualSize: image.source.virtualSize)
        )
    }
}
