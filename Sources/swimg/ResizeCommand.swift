import ArgumentParser
import DiskImage
import ImageConvert
import ImageDrivers
import ImageFormats
import ImageTools

struct ResizeCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "resize",
        abstract: "Change the size of a disk image.",
        discussion: """
            The size is the new one of the disk or, with + or - before it, the difference.

            A qcow2 image with errors is refused and stays as it is: check -r all repairs it.

            Example: swimg resize -f qcow2 disk.qcow2 +10G

            Example: swimg resize --shrink -f raw disk.raw 5G
            """)

    static let hasSignedSize = true

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the image (default: found out).", valueName: "format"))
    var format: String?

    @Flag(help: "Allow a smaller size; the data beyond it is lost.")
    var shrink = false

    @Option(
        parsing: .unconditional,
        help: ArgumentHelp(
            "Preallocation of the new part: \(Preallocation.names).", valueName: "mode"))
    var preallocation = "off"

    @Flag(name: [.customShort("q"), .customLong("quiet")], help: "Show nothing but errors.")
    var quiet = false

    @OptionGroup var names: ImageNameOptions

    @Argument(help: ArgumentHelp("The image, then its new size.", valueName: "file"))
    var words: [ImageName] = []

    func run(_ signals: Signals) async throws {
        guard words.count == 2, let given = words.first, let size = words.last else {
            throw CommandLineWords.mistake("Expecting image file name and size")
        }
        let name = try names.name(given, format: format)
        let described = try ImageDescription(name)
        guard described?.isWhole ?? true else {
            throw ImageError.unsupported(
                given.description, "an image that is a part of a file can only be read")
        }
        var resizing = ImageResizing(name, change: try change(size.description))
        resizing.format = described?.format
        if let format {
            guard let known = ImageFormat.named(format) else {
                throw ImageError.invalid("Could not open '\(given)': Unknown driver '\(format)'")
            }
            resizing.format = known
        }
        resizing.shrinks = shrink
        resizing.secrets = try names.objects.secrets()
        guard let mode = Preallocation(rawValue: preallocation) else {
            throw ImageError.invalid("Invalid preallocation mode '\(preallocation)'")
        }
        resizing.preallocation = mode
        resizing.onGuessedRaw = {
            Output.printError(ImageInPlace.guessedRawWarning(given.description))
        }
        do {
            try await signals.interrupting { [resizing] in try await resizing.run() }
        } catch is ImageResizing.ShrinkNotAllowed {
            Output.printError(Self.shrinkWarning)
            throw Verdict(status: 1)
        }
        if !quiet { Output.print("Image resized.\n") }
    }

    private func change(_ word: String) throws(ImageError) -> ImageResizing.Change {
        var text = Substring(word)
        if text.first == CommandLineWords.signedSizeMark { text.removeFirst() }
        let sign = text.first
        let signs: [Character?] = ["+", "-"]
        if signs.contains(sign) { text.removeFirst() }
        // A second sign is an error.
        let bytes = try Int64(
            sizeOption: signs.contains(text.first) ? "" : String(text), of: "size")
        return switch sign {
        case "+": .by(bytes)
        case "-": .by(-bytes)
        default: .to(bytes)
        }
    }

    private static let shrinkWarning = """
        \(ProgramName.called): Use the --shrink option to perform a shrink operation.
        \(ProgramName.called): warning: Shrinking an image will delete all data beyond the shrunken \
        image's end. Before performing such an operation, make sure there is no important data there.

        """
}
