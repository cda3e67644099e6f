import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// One `swimg convert`: the images to read, the target to write, and the manner.
///
/// ```swift
/// var conversion = Conversion(sources: ["disk.qcow2"], target: "disk.raw")
/// conversion.targetFormat = .raw
/// try await conversion.run()
/// ```
public struct Conversion: Sendable {
    /// Paths, or names that a driver of `Storages` claims; several guest disks are joined to one.
    public var sources: [ImageName]
    public var target: ImageName
    /// The description of an existing target (`-n`), with its key; nil if it has none.
    private var existing: ImageName?
    /// nil detects the format from the first bytes of each source.
    public var sourceFormat: ImageFormat?
    public var targetFormat = ImageFormat.raw
    public var options = CreationOptions()
    /// Largest number of chunks in flight; nil chooses as many as help.
    public var mostWorkers: Int?
    /// Limit for the buffers of all chunks together, in bytes.
    public var memory: Int64 = Pipeline.defaultMemory
    /// Largest number of bytes of data copied per second; nil has no limit. Shared blocks are not
    /// copied.
    public var bytesPerSecond: Int64?
    /// Whether writes begin in guest order; false is `-W`.
    public var writesInOrder = true
    public var compress = false
    /// Runs of zeros of at least this many bytes are not stored; 0 stores everything. nil means
    /// 4096 for data that has to be read anyway; a raw target shares what it can with a source that
    /// has holes, and does not search it.
    public var minSparse: Int64?
    /// Shares blocks with the source, where the file system can, instead of copying them.
    public var sharesBlocks = true
    /// Writes into an existing target (`-n`).
    public var skipsCreation = false
    /// Copies the persistent bitmaps of the only source.
    public var copiesBitmaps = false
    /// Leaves out bitmaps that were not saved properly.
    public var skipsBrokenBitmaps = false
    /// Promises that the existing target reads as zeros.
    public var targetIsZero = false
    public var sourceCacheMode = CacheMode.writeback
    public var targetCacheMode = CacheMode.unsafe
    /// Reads images that another program may be writing to (`-U`).
    public var shareForced = false
    /// The options of single storage drivers.
    public var storageOptions = StorageOptions()
    /// Reads the source as this internal snapshot recorded it (`-l`).
    public var snapshot: SnapshotName?
    /// Backing file of the target, which the source lies on, too (`-B`), and its format (`-F`).
    public var backingFile: ImageName?
    public var backingFormat: String?
    /// The part of the source that is copied; nil copies all of it.
    public var slice: BlockSlice?
    /// Algorithm of the digest if none is expected.
    public var digestAlgorithm = DigestAlgorithm.blkhash
    /// Called with the digest of the guest disk when all of it has been copied, before the target
    /// gets its name.
    public var onDigest: (@Sendable (_ digest: DiskDigest) -> Void)?
    /// The conversion fails if the digest differs from this one.
    public var expectedDigest: DiskDigest?
    /// SHA-256 that the file of the only source has to have, which is read in one pass then.
    public var sourceDigest: DiskDigest?
    /// Has the target's server compute the checksum of what it holds, when all of it has been
    /// flushed; the conversion fails if that differs from what was converted.
    public var verifies = false
    /// Reads on where the sources cannot be read, and writes zeros instead.
    public var salvages = false
    /// Called at the end of a salvaging conversion, also of one that fails, with what was lost.
    public var onLost: (@Sendable (_ ranges: [LostRange]) -> Void)?
    /// Called with a message about a circumstance that is no failure.
    public var onWarning: (@Sendable (_ message: String) -> Void)?
    /// Called from any task with the number of bytes done and the size of the guest disk.
    public var onProgress: (@Sendable (_ done: Int64, _ total: Int64) -> Void)?

    public static let workerRange = 1...64
    public static let largestMinSparse: Int64 = 16 << 20
    private static let defaultMinSparse: Int64 = 4096

    /// `minSparse` for data that is read.
    var scannedMinSparse: Int64 { minSparse ?? Self.defaultMinSparse }

    public init(sources: [ImageName], target: ImageName) {
        self.sources = sources
        self.target = target
    }

    /// Converts. The target gets its name when it is complete. After an error nothing new has the
    /// name, and an old file keeps it, unless it is written in place.
    ///
    /// - Throws: `ImageError`, or `CancellationError` if the task was cancelled.
    public func run() async throws {
        if let described = try ImageDescription(target) {
            return try await self.into(described).run()
        }
        let plan = try checkedPlan()
        let lost = salvages ? LostRanges() : nil
        defer { if let lost { onLost?(lost.all) } }
        let job = try await open(plan, lost)
        let files = try begin(plan.parameters, job)
        do {
            try await job.write(to: files.storage, data: files.dataStorage)
            try await files.commit()
        } catch {
            files.abandon()
            throw error
        }
    }

    private func begin(
        _ parameters: ImageParameters, _ job: TargetJob
    ) throws -> TargetFiles {
        do {
            if skipsCreation {
                return try TargetFiles(into: target, data: job.existingData, job.request)
            }
            return try TargetFiles(beginning: target, parameters, job.request)
        } catch let error as ImageError {
            guard !skipsCreation else { throw error.opening(target.description) }
            // A part is copied by `dd` only.
            let words =
                slice == nil
                ? "error while converting \(targetFormat)" : "error while creating output image"
            throw error.asQemu("\(words): \(error.qemuMessage)")
        }
    }

    /// Opens all images that are read.
    ///
    /// - Parameter lost: takes what cannot be read of them; nil makes that an error.
    private func open(_ plan: any NewImage, _ lost: LostRanges?) async throws -> TargetJob {
        var opener = ImageOpener(
            StorageAccess(
                cacheMode: sourceCacheMode, shareForced: shareForced, options: storageOptions))
        opener.snapshot = snapshot
        opener.streaming = streaming
        opener.isPatient = salvages
        var opened: [OpenedImage] = []
        for source in sources {
            opened.append(try await opener.open(source, format: sourceFormat))
        }
        try checkSalvageable(opened.flatMap(\.storages))
        opener.isPatient = false
        opener.snapshot = nil
        opener.streaming = nil
        let backing = backing(plan)
        let openEnded = opened.map(\.topLayer).first(where: \.isOpenEnded)
        if let openEnded { try checkOpenEnded(openEnded.storage.name, plan) }
        var input =
            try openEnded.map { CopyInput(openEnded: $0) }
            ?? input(opened, leavesBacking: backing != nil, lost)
        let image: any WrittenImage
        var existingData: ImageName?
        var files = opened.flatMap(\.files)
        if skipsCreation,
            let old = try await ExistingImage.open(existing ?? target, targetFormat, opener)
        {
            input = try old.under(input, leavesBacking: backing != nil, path: target)
            image = try old.written(leavesBacking: backing != nil)
            existingData = old.dataName
            files += old.filesBelow
        } else {
            var new = plan
            if let backing {
                let below = try await openBacking(backing, opener)
                new.setBacking(backing, virtualSize: below.source.virtualSize)
                files += below.files
            }
            try new.check()
            image = new
        }
        let bitmaps =
            copiesBitmaps ? try await BitmapCopy(self, from: opened[0], to: image) : nil
        return TargetJob(
            conversion: self, input: input, image: image, parameters: plan.parameters,
            existingData: existingData, bitmaps: bitmaps,
            request: TargetRequest(
                skipsCreation ? .writeInto : .create,
                access: StorageAccess(cacheMode: targetCacheMode, options: storageOptions),
                sourceFiles: Set(files), sourceNames: sources,
                isCopyInPlace: slice == nil && targetFormat.driver.isPlain
                    && opened.count == 1 && opened[0].format.driver.isPlain),
            requestsInFlight: opened.map(\.requestsInFlight).max() ?? 0,
            requestSize: opened.map(\.requestSize).max() ?? 0,
            sources: opened.flatMap(\.storages))
    }

    private var streaming: SourceStreaming {
        var streaming = SourceStreaming()
        if let sourceDigest {
            streaming.observer = { [name = sources[0].description] stream in
                try HashedStream(stream, expecting: sourceDigest, name: name)
            }
        }
        return streaming
    }

    /// Refuses what needs the size of a disk before its end has been reached.
    private func checkOpenEnded(_ name: String, _ plan: any NewImage) throws(ImageError) {
        let problem: String? =
            if sources.count > 1 { "joined with other sources" } else if slice != nil {
                "copied in parts"
            } else if backing(plan) != nil {
                "converted with a backing file"
            } else if skipsCreation, !targetFormat.driver.isPlain {
                "converted into an existing image in format '\(targetFormat)'"
            } else if plan.parameters.size != nil {
                "given another size"
            } else if plan.parameters.isDataFileRaw {
                "converted with a raw data file"
            } else if plan.parameters.preallocation != .off { "preallocated" } else { nil }
        guard let problem else { return }
        throw .unsupported(
            name, "cannot be \(problem), because only its end tells the size of the disk")
    }

    /// The backing file of a new target, from `-B` and `-F` or from the options.
    private func backing(_ plan: any NewImage) -> BackingName? {
        guard let name = backingFile ?? plan.parameters.backingFile else { return nil }
        return BackingName(name, format: backingFormat ?? plan.parameters.backingFormat)
    }

    /// Joins all sources to one disk. A target with a backing file needs only the parts that the
    /// source does not leave to a backing file of its own.
    private func input(
        _ opened: [OpenedImage], leavesBacking: Bool, _ lost: LostRanges?
    ) throws(ImageError) -> CopyInput {
        func salvaged(_ disks: [any ImageSource]) -> [any ImageSource] {
            guard let lost else { return disks }
            return disks.enumerated().map { number, disk in
                SalvagedSource(disk) { lost.note(LostRange($0, of: number, $1)) }
            }
        }
        let content = try sliced(ConcatenatedSource(salvaged(opened.map(\.source))))
        return try CopyInput(
            content: content,
            extents: leavesBacking
                ? ConcatenatedSource(salvaged(opened.map(\.ownLayer))) : content)
    }

    /// Refuses sources of which nothing can be read behind an error.
    private func checkSalvageable(_ storages: [any Storage]) throws(ImageError) {
        guard salvages, let stream = storages.first(where: \.traits.isStream) else { return }
        throw .unsupported(
            stream.name, "cannot be salvaged (--salvage), because it is read in one pass")
    }

    private func sliced(_ source: ConcatenatedSource) throws(ImageError) -> ConcatenatedSource {
        guard let slice else { return source }
        guard let range = slice.range(of: source.virtualSize) else {
            onWarning?("\(sources[0]): cannot skip to specified offset")
            return try ConcatenatedSource([])
        }
        return try ConcatenatedSource([SliceSource(source, range)])
    }

    /// Refuses contradictory requests before anything is opened.
    private func checkedPlan() throws(ImageError) -> any NewImage {
        guard !sources.isEmpty else { throw .invalid("a source is needed") }
        guard sourceDigest == nil || sources.count == 1 else {
            throw .invalid("--source-digest needs a single source")
        }
        guard !copiesBitmaps || sources.count == 1 else {
            throw .invalid("Copying bitmaps only possible with single source")
        }
        guard copiesBitmaps || !skipsBrokenBitmaps else {
            throw .invalid("Use of --skip-broken-bitmaps requires --bitmaps")
        }
        guard snapshot == nil || sources.count == 1 else {
            throw .invalid("No support for concatenating multiple snapshot")
        }
        guard mostWorkers.map(Self.workerRange.contains) ?? true else {
            throw .invalid("the number of workers (-m) must be between 1 and 64")
        }
        guard scannedMinSparse % 512 == 0,
            (0...Self.largestMinSparse).contains(scannedMinSparse)
        else {
            throw .invalid(
                "Invalid buffer size for sparse output specified. Valid sizes are multiples of "
                    + "512 up to \(Self.largestMinSparse). Select 0 to disable sparse detection "
                    + "(fully allocates output).")
        }
        if skipsCreation, !options.isEmpty {
            throw .invalid("-o has no effect when skipping image creation")
        }
        guard !salvages || sourceDigest == nil else {
            throw .invalid("--salvage and --source-digest cannot be used together")
        }
        if targetIsZero, !skipsCreation {
            throw .invalid("--target-is-zero requires use of -n flag")
        }
        if verifies {
            let driver = Storages.driver(for: target)
            guard driver.checksums, targetFormat.driver.isPlain else {
                throw .invalid(
                    "--verify needs a target of the format raw on a server that computes "
                        + "checksums: an imageio:// address")
            }
        }
        let creator = try targetFormat.creator()
        if compress, !creator.canCompress {
            throw ImageError.invalid("compression is not supported for format '\(targetFormat)'")
                .asQemu("Compression not supported for this file format")
        }
        // An existing image (-n) takes no options, and the image that replaces it becomes like it.
        let planned = skipsCreation ? ImageFormat.raw : targetFormat
        let plan: any NewImage
        do {
            plan = try planned.creator().newImage(TypedOptions(options, for: planned))
        } catch {
            throw ImageError(
                error.kind, path: target.description,
                "error while converting \(targetFormat): \(error.message)"
            ).asQemu("error while converting \(targetFormat): \(error.qemuMessage)")
        }
        if compress, plan.parameters.preallocation != .off {
            throw .invalid("Compression and preallocation not supported at the same time")
        }
        if compress, plan.parameters.dataFile != nil {
            throw .invalid("Compression and a data file not supported at the same time")
        }
        if compress, plan.parameters.isEncrypted {
            throw Self.compressesEncrypted
        }
        try checkBacking(plan)
        return plan
    }

    private static let compressesEncrypted = ImageError.invalid(
        "Compression and encryption not supported at the same time")

    private func checkBacking(_ plan: any NewImage) throws(ImageError) {
        guard let backing = backing(plan) else {
            if backingFormat != nil || plan.parameters.backingFormat != nil {
                throw .invalid("a backing format (-F) needs a backing file (-B)")
            }
            return
        }
        if !targetFormat.driver.canHaveBacking {
            throw .invalid("a backing file is not supported for format '\(targetFormat)'")
        }
        if sources.count > 1 {
            throw ImageError.invalid("a backing file cannot be used with several sources").asQemu(
                "Having a backing file for the target makes no sense when concatenating multiple "
                    + "input images")
        }
        try plan.checkBackedConversion()
        // An existing image records its backing file itself.
        if backing.format == nil, !skipsCreation {
            throw ImageError.invalid("the use of a backing file needs its format (-F)")
                .asQemu("Use of backing file requires explicit backing format")
        }
    }

    /// Returns this conversion with the target's plain name in place of its description.
    private func into(_ described: ImageDescription) throws(ImageError) -> Conversion {
        guard skipsCreation else {
            throw .invalid("a target that is described (json:) needs -n")
        }
        guard described.isWhole else {
            throw .unsupported(
                described.place.description,
                "an image that is a part of a file can only be read")
        }
        var result = self
        result.existing = target
        result.target = described.place
        if let format = described.format { result.targetFormat = format }
        return result
    }

    /// Opens the backing file for its size: behind its end the target reads as zeros.
    private func openBacking(
        _ backing: BackingName, _ opener: ImageOpener
    ) async throws -> OpenedImage {
        let format = try backing.format.map { name throws(ImageError) in
            guard let format = ImageFormat.ofBacking(name) else {
                throw .invalid("unknown backing format '\(name)'")
            }
            return format
        }
        // No byte of it is read, so it may be the disk of a running machine.
        var opener = opener
        opener.access.shareForced = true
        opener.needsSecrets = false
        return try await opener.open(
            ImageOpener.backingName(backing.name, namedBy: target), format: format)
    }
}
