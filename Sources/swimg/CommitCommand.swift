import ArgumentParser
import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage
import ImageTools

struct CommitCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "commit",
        abstract: "Write the content of an overlay into its backing file.",
        discussion: """
            The overlay is empty afterwards, unless -d or -b is given. A base that is smaller than \
            the overlay grows.

            Example: swimg commit -f qcow2 overlay.qcow2
            """)

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the overlay (default: found out).", valueName: "format"))
    var format: String?

    @Option(
        name: [.customShort("t"), .customLong("cache")], parsing: .unconditional,
        help: ArgumentHelp(
            "Cache mode of all images: \(CacheMode.names).", valueName: "mode"))
    var cache = "writeback"

    @Option(
        name: [.customShort("b"), .customLong("base")], parsing: .unconditional,
        help: ArgumentHelp(
            "The image of the backing chain to write into (default: the backing file).",
            valueName: "file"))
    var base: ImageName?

    @Option(
        name: [.customShort("r"), .customLong("rate-limit")], parsing: .unconditional,
        help: ArgumentHelp("Bytes to write per second at most (k, M, G).", valueName: "rate"))
    var rate: String?

    @Flag(name: [.customShort("d"), .customLong("drop")], help: "Leave the overlay as it is.")
    var keepsOverlay = false

    @Flag(name: [.customShort("p"), .customLong("progress")], help: "Show progress.")
    var progress = false

    @Flag(name: [.customShort("q"), .customLong("quiet")], help: "Show nothing but errors.")
    var quiet = false

    @OptionGroup var names: ImageNameOptions

    @OptionGroup var servers: ServerOptions

    @Argument(help: ArgumentHelp("The overlay.", valueName: "file"))
    var files: [ImageName] = []

    func run(_ signals: Signals) async throws {
        let printer = ProgressPrinter(isShown: progress && !quiet)
        var commit = try makeCommit()
        commit.onProgress = { done, total in printer.update(done: done, total: total) }
        try await signals.interrupting(showing: printer) { [commit] in try await commit.run() }
        if !quiet { Output.print("Image committed.\n") }
    }

    private func makeCommit() throws(ImageError) -> ImageCommit {
        guard let file = files.first, files.count == 1 else {
            throw CommandLineWords.mistake("Expecting one image file name")
        }
        var image = try ImageInPlace(
            file, try names.name(file, format: format), format: format, cache: cache)
        image.access.options = try servers.options()
        image.access.options.secrets = try names.objects.secrets()
        var commit = ImageCommit(image)
        commit.base = base
        commit.keepsOverlay = keepsOverlay
        commit.rate = try rate.flatMap(Int64.rateOption)
        return commit
    }
}

extension ImageInPlace {
    /// The image of a verb that changes it.
    ///
    /// - Parameters:
    ///   - file: the image as it stands on the command line, for messages.
    ///   - name: the image as `ImageName.option` understands it.
    init(
        _ file: ImageName, _ name: ImageName, format: String?, cache: String
    ) throws(ImageError) {
        self.init(name)
        if let format {
            guard let known = ImageFormat.named(format) else {
                throw .invalid("Could not open '\(file)': Unknown driver '\(format)'")
            }
            self.format = known
        }
        guard let mode = CacheMode(rawValue: cache) else {
            throw .invalid("Invalid cache option: \(cache)")
        }
        access.cacheMode = mode
        onGuessedRaw = { Output.printError(ImageInPlace.guessedRawWarning(file.description)) }
    }
}
