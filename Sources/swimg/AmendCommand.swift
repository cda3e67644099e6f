import ArgumentParser
import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage
import ImageTools

struct AmendCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "amend",
        abstract: "Change options of an existing disk image.",
        discussion: """
            Of qcow2 images: compat, lazy_refcounts, refcount_bits and size. The disk stays the \
            same, unless its size changes.

            Example: swimg amend -f qcow2 -o compat=1.1,lazy_refcounts=on disk.qcow2
            """)

    @Option(
        name: [.customShort("o"), .customLong("options")], parsing: .unconditionalSingleValue,
        help: ArgumentHelp(
            "Options to change, as key=value,…; -o help lists them.", valueName: "options"))
    var options: [OptionText] = []

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the image (default: found out).", valueName: "format"))
    var format: String?

    @Option(
        name: [.customShort("t"), .customLong("cache")], parsing: .unconditional,
        help: ArgumentHelp("Cache mode of the image: \(CacheMode.names).", valueName: "mode"))
    var cache = "writeback"

    @Flag(name: [.customShort("p"), .customLong("progress")], help: "Show progress.")
    var progress = false

    @Flag(name: [.customShort("q"), .customLong("quiet")], help: "Show nothing but errors.")
    var quiet = false

    @Flag(help: "Accepted: nothing that can be changed needs it.")
    var force = false

    @OptionGroup var names: ImageNameOptions

    @Argument(help: ArgumentHelp("The image.", valueName: "file"))
    var files: [ImageName] = []

    func run(_ signals: Signals) async throws {
        guard !options.isEmpty else { throw CommandLineWords.mistake("Must specify options (-o)") }
        let options = try CreationOptions(options.map(\.bytes))
        if let format, options.asksForHelp {
            guard let known = ImageFormat.named(format) else {
                throw ImageError.invalid("Unknown file format '\(format)'")
            }
            return Output.print(try known.amendHelp())
        }
        guard let file = files.first, files.count == 1 else {
            throw ImageError.invalid("Expecting one image file name")
        }
        let amending = ImageAmending(
            try ImageInPlace(file, names, format: format, cache: cache), options)
        if options.asksForHelp { return Output.print(try await amending.help()) }
        let printer = ProgressPrinter(isShown: progress && !quiet)
        try await signals.interrupting { try await amending.run() }
        printer.finish()
    }
}
