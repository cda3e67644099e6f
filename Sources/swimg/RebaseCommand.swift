import ArgumentParser
import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage
import ImageTools

struct RebaseCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "rebase",
        abstract: "Give an overlay another backing file.",
        discussion: """
            The disk stays the same: what the new backing file does not hold is copied into the \
            overlay. With -u only the name changes, for a backing file that was moved. An empty \
            name makes the overlay independent.

            Example: swimg rebase -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
            """)

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the overlay (default: found out).", valueName: "format"))
    var format: String?

    @Option(
        name: [.customShort("t"), .customLong("cache")], parsing: .unconditional,
        help: ArgumentHelp("Cache mode of the overlay: \(CacheMode.names).", valueName: "mode"))
    var cache = "writeback"

    @Option(
        name: [.customShort("T"), .customLong("backing-cache")], parsing: .unconditional,
        help: ArgumentHelp("Cache mode of the backing files.", valueName: "mode"))
    var sourceCache = "writeback"

    @Option(
        name: [.customShort("b"), .customLong("backing")], parsing: .unconditional,
        help: ArgumentHelp(
            "The new backing file, as its name is to stand in the overlay.", valueName: "file"))
    var backing: ImageName?

    @Option(
        name: [.customShort("F"), .customShort("B"), .customLong("backing-format")],
        parsing: .unconditional,
        help: ArgumentHelp("The format of the new backing file.", valueName: "format"))
    var backingFormat: String?

    @Flag(
        name: [.customShort("u"), .customLong("backing-unsafe")],
        help: "Change the name without looking at any backing file.")
    var unsafe = false

    @Flag(
        name: [.customShort("c"), .customLong("compress")],
        help: "Compress what is copied into the overlay.")
    var compress = false

    @Flag(name: [.customShort("p"), .customLong("progress")], help: "Show progress.")
    var progress = false

    @Flag(name: [.customShort("q"), .customLong("quiet")], help: "Show nothing but errors.")
    var quiet = false

    @OptionGroup var access: SourceOptions

    @Argument(help: ArgumentHelp("The overlay.", valueName: "file"))
    var files: [ImageName] = []

    func run(_ signals: Signals) async throws {
        let printer = ProgressPrinter(isShown: progress && !quiet)
        var rebase = try makeRebase()
        rebase.onProgress = { done, total in printer.update(done: done, total: total) }
        try await signals.interrupting(showing: printer) { [rebase] in try await rebase.run() }
    }

    private func makeRebase() throws(ImageError) -> ImageRebase {
        guard let file = files.first, files.count == 1 else {
            throw CommandLineWords.mistake("Expecting one image file name")
        }
        guard unsafe || backing != nil else {
            throw CommandLineWords.mistake(
                "Must specify backing file (-b) or use unsafe mode (-u)")
        }
        var image = try ImageInPlace(
            file, try access.name(file, format: format), format: format, cache: cache)
        image.access.options = try access.storageOptions()
        var rebase = ImageRebase(image)
        rebase.backing = backing
        if let backingFormat, ImageFormat.ofBacking(backingFormat) == nil {
            throw .invalid("Invalid format name: '\(backingFormat)'")
        }
        rebase.backingFormat = backingFormat
        rebase.isUnsafe = unsafe
        rebase.compress = compress
        guard let mode = CacheMode(rawValue: sourceCache) else {
            throw .invalid("Invalid source cache option: \(sourceCache)")
        }
        rebase.sourceAccess = try access.access(cacheMode: mode)
        return rebase
    }
}
