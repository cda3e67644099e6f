import ArgumentParser
import CLinux
import DiskImage
import Glibc
import ImageConvert
import ImageDrivers
import ImageFormats
import ImageStorage
import Synchronization

struct ConvertCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "convert",
        abstract: "Convert a disk image to another format.",
        discussion: """
            Several sources are joined to one target. The target gets its name when it is \
            complete; an existing file of that name stays until then.

            Sources and target can be NBD exports (nbd://host/export, nbd+unix:///?socket=path). A \
            command line in brackets starts a server and means its export. A source can be a \
            compressed file (disk.raw.xz, .gz, .zst, .bz2), a FIFO, or - for standard input.

            Example: swimg convert -f qcow2 -O raw -m 8 -W disk.qcow2 disk.raw

            Example: swimg convert -f raw -O qcow2 [ nbdkit curl https://host/disk.img ] disk.qcow2
            """)

    @Option(
        name: [.customShort("f"), .customLong("source-format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the sources (default: found out).", valueName: "format"))
    var sourceFormat: String?

    @Option(
        name: [.customShort("O"), .customLong("target-format")], parsing: .unconditional,
        help: ArgumentHelp(
            "The format of the target: \(ImageFormat.creatableNames).", valueName: "format"))
    var targetFormat: String?

    @Option(
        name: [.customShort("m"), .customLong("parallel")], parsing: .unconditional,
        help: ArgumentHelp(
            "Parts to convert at once, 1 to 64 (default: as many as help).",
            valueName: "number"))
    var workers: String?

    @Option(
        name: .customLong("memory"), parsing: .unconditional,
        help: ArgumentHelp(
            "Memory for the parts in progress (k, M, G), 1M or more (default: 64M).",
            valueName: "size"))
    var memory: String?

    @Option(
        name: [.customShort("r"), .customLong("rate-limit")], parsing: .unconditional,
        help: ArgumentHelp(
            "Bytes of data to copy per second, at most (k, M, G; default: no limit).",
            valueName: "rate"))
    var rate: String?

    @Flag(
        name: [.customShort("W"), .customLong("oob-writes")],
        help: ArgumentHelp(
            "Write parts in any order. Without it, writes begin in the disk's order."))
    var unordered = false

    @Option(
        name: [.customShort("S"), .customLong("sparse-size")], parsing: .unconditional,
        help: ArgumentHelp(
            "Shortest run of zeros to leave out, a multiple of 512 (k, M, G); 0 writes everything "
                + "(default: 4k, but shareable data of a source with holes is not searched).",
            valueName: "size"))
    var minSparse: String?

    @Flag(
        name: .customLong("no-clone"),
        help: "Copy all data, and search it for zeros, even if the file system could share it."
    )
    var noClone = false

    @Flag(
        name: [.customShort("C"), .customLong("copy-range-offloading")],
        help: "Accepted: sharing is tried without being asked for.")
    var copyOffloading = false

    @Flag(
        name: [.customShort("c"), .customLong("compress")],
        help: "Compress the target (\(ImageFormat.compressingNames)).")
    var compress = false

    @Option(
        name: [.customShort("o"), .customLong("target-format-options")],
        parsing: .unconditionalSingleValue,
        help: ArgumentHelp(
            "Options of the new image, as key=value,…; -o help lists them.", valueName: "options"))
    var options: [OptionText] = []

    @Flag(
        name: [.customShort("n"), .customLong("no-create")], help: "Write into an existing target.")
    var skipCreation = false

    @Flag(
        name: .customLong("target-is-zero"), help: "The existing target reads as zeros (with -n).")
    var targetIsZero = false

    @Flag(help: "Copy the persistent bitmaps of the source.")
    var bitmaps = false

    @Flag(
        name: .customLong("skip-broken-bitmaps"),
        help: "Leave out bitmaps that were not saved properly (with --bitmaps).")
    var skipBrokenBitmaps = false

    @Flag(
        help: "Go on where the sources cannot be read: what is lost becomes zeros, with a warning.")
    var salvage = false

    @Flag(name: [.customShort("p"), .customLong("progress")], help: "Show progress.")
    var progress = false

    @Flag(name: [.customShort("q"), .customLong("quiet")], help: "Show nothing but errors.")
    var quiet = false

    @Option(
        name: [.customShort("t"), .customLong("target-cache")], parsing: .unconditional,
        help: ArgumentHelp(
            "Cache mode of the target: \(CacheMode.names).", valueName: "mode"))
    var targetCache = "unsafe"

    @Option(
        name: [.customShort("T"), .customLong("source-cache")], parsing: .unconditional,
        help: ArgumentHelp("Cache mode of the sources.", valueName: "mode"))
    var sourceCache = "writeback"

    @Option(
        name: [.customShort("l"), .customLong("snapshot")], parsing: .unconditional,
        help: .snapshot)
    var snapshot: OptionText?

    @Option(
        name: [.customShort("B"), .customShort("b"), .customLong("backing")],
        parsing: .unconditional,
        help: ArgumentHelp(
            "The backing file of the target, which leaves out data that it provides.",
            valueName: "file"))
    var backingFile: ImageName?

    @Option(
        name: [.customShort("F"), .customLong("backing-format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the backing file.", valueName: "format"))
    var backingFormat: String?

    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "Read images that another process writes to.")
    var forceShare = false

    @Flag(
        name: .customLong("image-opts"),
        help: "The sources are described by options (driver=qcow2,file.filename=…).")
    var imageOpts = false

    @Flag(
        name: .customLong("target-image-opts"),
        help: "The existing target is described by options (with -n).")
    var targetImageOpts = false

    @Option(name: .customLong("object"), parsing: .unconditionalSingleValue, help: .object)
    var objects: [OptionText] = []

    @Flag(help: "Print the digest of the written guest disk, and the name of the target.")
    var digest = false

    @Option(
        name: .customLong("expect-digest"),
        help: ArgumentHelp("Fail if the digest differs from this one.", valueName: "digest"))
    var expectedDigest: String?

    @Option(
        name: .customLong("source-digest"),
        help: ArgumentHelp(
            "Fail if the SHA-256 of the source's file differs from this one; it is read in one "
                + "pass.", valueName: "digest"))
    var sourceDigest: String?

    @Option(help: .algorithm)
    var algorithm: String?

    @Flag(
        help: ArgumentHelp(
            "Have the server of an imageio:// target compute the checksum of the written disk, and "
                + "fail if it is not that of what was converted."))
    var verify = false

    @OptionGroup var servers: ServerOptions

    @Argument(help: ArgumentHelp("The sources, then the target.", valueName: "file"))
    var files: [ImageName] = []

    func run(_ signals: Signals) async throws {
        let options = try CreationOptions(options.map(\.bytes))
        if options.asksForHelp {
            return Output.print(
                try ImageFormat.option(targetFormat ?? "raw").optionHelp(
                    includesFile: files.count > 1))
        }
        let printer = quiet ? nil : ProgressPrinter(isShown: progress)
        var conversion = try makeConversion()
        conversion.options = options
        conversion.options.secrets = conversion.storageOptions.secrets
        conversion.onProgress = { done, total in printer?.update(done: done, total: total) }
        let found = Mutex<DiskDigest?>(nil)
        if digest { conversion.onDigest = { digest in found.withLock { $0 = digest } } }
        // The lines come when the display of progress has ended.
        let lost = Mutex<[LostRange]>([])
        conversion.onLost = { ranges in lost.withLock { $0 = ranges } }
        defer { if !quiet { SalvageReport.printError(lost.withLock { $0 }) } }
        try await signals.interrupting(showing: printer) { [conversion] in
            try await conversion.run()
        }
        if let digest = found.withLock({ $0 }) {
            let target = conversion.target.description.withoutControlCharacters
            Output.print("\(digest)  \(target)\n")
        }
    }

    private func makeConversion() throws(ImageError) -> Conversion {
        guard files.count >= 2, let target = files.last else {
            throw ImageError.invalid("a source and a target are needed")
                .asQemu("Must specify image file name")
        }
        if target == "-", progress || digest {
            throw .invalid(
                "the target - is standard output, where -p and --digest would print, too")
        }
        var sources: [ImageName] = []
        for file in files.dropLast() {
            sources.append(try ImageName.option(file, isOptions: imageOpts, format: sourceFormat))
        }
        var conversion = Conversion(
            sources: sources, target: try ImageName.option(target, isOptions: targetImageOpts))
        conversion.sourceFormat = try sourceFormat.map { name throws(ImageError) in
            try ImageFormat.option(name, of: files[0])
        }
        if targetImageOpts {
            guard skipCreation else {
                throw .invalid("--target-image-opts requires use of -n flag")
            }
            guard targetFormat == nil else {
                throw .invalid("-O and --target-image-opts cannot be used together")
            }
        } else {
            conversion.targetFormat = try ImageFormat.option(targetFormat ?? "raw")
        }
        if let workers {
            guard let number = Int64(asInC: workers).map(Int.init),
                Conversion.workerRange.contains(number)
            else {
                throw .invalid(
                    "Invalid number of coroutines. Allowed number of coroutines is between 1 and "
                        + "\(Conversion.workerRange.upperBound)")
            }
            conversion.mostWorkers = number
        }
        if let memory {
            guard let size = Int64(byteSize: memory), size >= 1 << 20 else {
                throw .invalid("invalid size '\(memory)': --memory takes 1M or more")
            }
            conversion.memory = size
        }
        conversion.writesInOrder = !unordered
        conversion.bytesPerSecond = try rate.flatMap(Int64.rateOption)
        if let minSparse {
            conversion.minSparse = try Int64.sizeArgument(
                minSparse, name: "buffer size for sparse output")
        }
        conversion.sharesBlocks = try sharesBlocks()
        conversion.salvages = salvage
        conversion.compress = compress
        conversion.skipsCreation = skipCreation
        conversion.copiesBitmaps = bitmaps
        conversion.skipsBrokenBitmaps = skipBrokenBitmaps
        conversion.onWarning = { Output.printError("\(ProgramName.called): \($0)\n") }
        conversion.targetIsZero = targetIsZero
        conversion.targetCacheMode = try CacheMode.option(targetCache, "cache")
        conversion.sourceCacheMode = try CacheMode.option(sourceCache)
        conversion.shareForced = forceShare
        conversion.backingFile = backingFile
        conversion.backingFormat = backingFormat
        conversion.snapshot = try snapshot.map(SnapshotName.option)
        conversion.storageOptions = try servers.options()
        conversion.storageOptions.secrets = try objects.secrets()
        let algorithm = try algorithm.map(DigestAlgorithm.option)
        guard algorithm == nil || digest || expectedDigest != nil else {
            throw .invalid("--algorithm needs --digest or --expect-digest")
        }
        conversion.digestAlgorithm = algorithm ?? .blkhash
        conversion.verifies = verify
        if let expectedDigest {
            guard let digest = DiskDigest(expectedDigest, algorithm: algorithm) else {
                throw .invalid(
                    "invalid digest '\(expectedDigest)': it is 64 hexadecimal digits, behind "
                        + "'blkhash:' or 'sha256:' or with --algorithm")
            }
            conversion.expectedDigest = digest
        }
        if let sourceDigest {
            guard let digest = DiskDigest(sourceDigest, algorithm: .sha256) else {
                throw .invalid(
                    "invalid digest '\(sourceDigest)': --source-digest takes 64 hexadecimal "
                        + "digits, with or without 'sha256:'")
            }
            conversion.sourceDigest = digest
        }
        return conversion
    }

    private func sharesBlocks() throws(ImageError) -> Bool {
        if copyOffloading {
            let other = compress ? "-c" : minSparse != nil ? "-S" : noClone ? "--no-clone" : nil
            if let other {
                throw ImageError.invalid(
                    "cannot enable copy offloading (-C) when \(other) is used"
                ).asQemu("Cannot enable copy offloading when \(other) is used")
            }
            guard !salvage else {
                throw .invalid("Cannot use copy offloading in salvaging mode")
            }
        }
        return !noClone
    }
}
