import ArgumentParser
import DiskImage
import ImageDrivers
import ImageFormats
import ImageTools

struct InfoCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "info",
        abstract: "Show the properties of a disk image.",
        discussion: """
            Opens only the image itself; with --backing-chain, its backing files too. Images that \
            cannot be converted (encrypted, or with their data in another file) are described, too.

            Example: swimg info --output=json disk.qcow2
            """)

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the image (default: found out).", valueName: "format"))
    var format: String?

    @Option(help: ArgumentHelp("Output form: human or json.", valueName: "form"))
    var output = "human"

    @Flag(name: .customLong("backing-chain"), help: "Describe the backing files, too.")
    var backingChain = false

    @OptionGroup var access: SourceOptions

    @Argument(help: ArgumentHelp("The image.", valueName: "file"))
    var files: [ImageName] = []

    func run(_ signals: Signals) async throws {
        guard files.count == 1 else {
            throw CommandLineWords.mistake("Expecting one image file name")
        }
        let isJSON = try Output.isJSON(output)
        let opener = ImageOpener(try access.access())
        let known = try format.map { name throws(ImageError) in
            try ImageFormat.option(name, of: files[0])
        }
        let name = try access.name(files[0], format: format)
        try await signals.interrupting {
            let images = try await opener.facts(name, format: known, wholeChain: backingChain)
            show(images.map { InfoReport($0) }, isJSON: isJSON)
        }
    }

    private func show(_ reports: [InfoReport], isJSON: Bool) {
        if isJSON {
            let values = reports.map(\.json)
            Output.print((backingChain ? JSONValue.array(values) : values[0]).text + "\n")
        } else {
            Output.print(reports.map(\.text).joined(separator: "\n"))
        }
    }
}
