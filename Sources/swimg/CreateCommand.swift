import ArgumentParser
import DiskImage
import ImageConvert
import ImageDrivers
import ImageFormats
import ImageTools

struct CreateCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "create",
        abstract: "Create an empty disk image.",
        discussion: """
            An existing file of that name is replaced when the new image is complete.

            Example: swimg create -f qcow2 disk.qcow2 20G

            Example: swimg create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
            """)

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp(
            "The format of the image: \(ImageFormat.creatableNames).", valueName: "format"))
    var format = "raw"

    @Option(
        name: [.customShort("o"), .customLong("options")], parsing: .unconditionalSingleValue,
        help: ArgumentHelp(
            "Options of the image, as key=value,…; -o help lists them.", valueName: "options"))
    var options: [OptionText] = []

    @Option(
        name: [.customShort("b"), .customLong("backing")], parsing: .unconditional,
        help: ArgumentHelp("The backing file of the image.", valueName: "file"))
    var backingFile: ImageName?

    @Option(
        name: [.customShort("F"), .customShort("B"), .customLong("backing-format")],
        parsing: .unconditional,
        help: ArgumentHelp("The format of the backing file.", valueName: "format"))
    var backingFormat: String?

    @Flag(
        name: [.customShort("u"), .customLong("backing-unsafe")],
        help: "Do not look at the backing file; needs a size.")
    var unsafe = false

    @Flag(name: [.customShort("q"), .customLong("quiet")], help: "Show nothing but errors.")
    var quiet = false

    @Option(name: .customLong("object"), parsing: .unconditionalSingleValue, help: .object)
    var objects: [OptionText] = []

    @OptionGroup var servers: ServerOptions

    @Argument(help: ArgumentHelp("The image, then its size.", valueName: "file"))
    var words: [ImageName] = []

    func run(_ signals: Signals) async throws {
        let options = try CreationOptions(options.map(\.bytes))
        if options.asksForHelp {
            return Output.print(
                try knownFormat().optionHelp(includesFile: !words.isEmpty))
        }
        guard let name = words.first else {
            throw CommandLineWords.mistake("Expecting image file name")
        }
        guard words.count <= 2 else {
            throw CommandLineWords.mistake("Unexpected argument: \(words[2])")
        }
        var creation = ImageCreation(name, format: try knownFormat())
        creation.options = options
        creation.options.secrets = try objects.secrets()
        creation.size = try words.dropFirst().first.map {
            try Int64.sizeArgument($0.description, name: "image size")
        }
        creation.backingFile = backingFile
        creation.backingFormat = backingFormat
        creation.skipsBackingCheck = unsafe
        creation.storageOptions = try servers.options()
        creation.storageOptions.secrets = creation.options.secrets
        try await signals.interrupting { [creation, quiet] in
            let plan = try await creation.prepare()
            if !quiet { Output.print(plan.line.withoutControlCharacters + "\n") }
            if let warning = try await plan.create() {
                Output.printError("\(ProgramName.called): warning: \(warning)\n")
            }
        }
    }

    private func knownFormat() throws(ImageError) -> ImageFormat {
        guard let known = ImageFormat.named(format) else {
            throw ImageError(
                .invalid, path: words.first?.description, "Unknown file format '\(format)'")
        }
        return known
    }
}
