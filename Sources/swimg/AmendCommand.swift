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
            Of qcow2 images: compat, lazy_refcounts, refcount_bits, size, names of files, and of \
            encrypted ones the key slots. Of luks images: the key slots. The disk stays the same, \
            unless its size changes.

            Example: swimg amend -f qcow2 -o compat=1.1,lazy_refcounts=on disk.qcow2

            Example: swimg amend --object secret,id=old,file=old.key --object \
            secret,id=new,file=new.key --image-opts -o state=active,new-secret=new \
            driver=luks,key-secret=old,file.filename=disk.luks
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

    @Flag(help: "Overwrite a key slot in use, or erase the last one, which loses the disk.")
    var force = false

    @OptionGroup var names: ImageNameOptions

    @Argument(help: ArgumentHelp("The image.", valueName: "file"))
    var files: [ImageName] = []

    func run(_ signals: Signals) async throws {
        guard !options.isEmpty else { throw CommandLineWords.mistake("Must specify options (-o)") }
        var options = try CreationOptions(options.map(\.bytes))
        options.secrets = try names.objects.secrets()
        if let format, options.asksForHelp {
            guard let known = ImageFormat.named(format) else {
                throw ImageError.invalid("Unknown file format '\(format)'")
            }
            return Output.print(try known.amendHelp())
        }
        guard let file = files.first, files.count == 1 else {
            throw ImageError.invalid("Expecting one image file name")
        }
        var image = try ImageInPlace(
            file, try names.name(file, format: format), format: format, cache: cache)
        image.access.options.secrets = options.secrets
        var amending = ImageAmending(image, options)
        amending.force = force
        if options.asksForHelp { return Output.print(try await amending.help()) }
        let printer = ProgressPrinter(isShown: progress && !quiet)
        try await signals.interrupting { [amending] in try await amending.run() }
        printer.finish()
    }
}
