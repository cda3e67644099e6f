import ArgumentParser
import DiskImage
import ImageConvert
import ImageDrivers
import ImageFormats
import ImageTools

struct MeasureCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "measure",
        abstract: "Calculate the space that an image would take.",
        discussion: """
            Measures the result of converting an image, or of creating an empty one (--size). A \
            conversion with the same -O and -o stores at most the required size.

            Example: swimg measure -O qcow2 --output=json -f raw disk.raw
            """)

    @Option(
        name: [.customShort("f"), .customLong("format"), .customLong("source-format")],
        parsing: .unconditional,
        help: ArgumentHelp("The format of the image (default: found out).", valueName: "format"))
    var sourceFormat: String?

    @Option(
        name: [.customShort("O"), .customLong("target-format")], parsing: .unconditional,
        help: ArgumentHelp(
            "The format to measure for: \(ImageFormat.creatableNames).", valueName: "format"))
    var targetFormat = "raw"

    @Option(
        name: [.customShort("o"), .customLong("options"), .customLong("target-format-options")],
        parsing: .unconditionalSingleValue,
        help: ArgumentHelp("Options of the new image, as key=value,….", valueName: "options"))
    var options: [OptionText] = []

    @Option(
        name: [.customLong("size"), .customShort("s")], parsing: .unconditional,
        help: ArgumentHelp("Size of an empty disk in bytes (k, M, G, T).", valueName: "size"))
    var size: String?

    @Option(
        name: [.customShort("l"), .customLong("snapshot")], parsing: .unconditional,
        help: .snapshot)
    var snapshot: OptionText?

    @Option(help: ArgumentHelp("Output form: human or json.", valueName: "form"))
    var output = "human"

    @OptionGroup var access: SourceOptions

    @Argument(help: ArgumentHelp("The image.", valueName: "file"))
    var files: [ImageName] = []

    func run(_ signals: Signals) async throws {
        let isJSON = try Output.isJSON(output)
        let measurement = try makeMeasurement()
        let result = try await signals.interrupting { try await measurement.run() }
        Output.print(isJSON ? Self.json(result) : Self.text(result))
    }

    private func makeMeasurement() throws(ImageError) -> Measurement {
        guard files.count <= 1 else {
            throw .invalid("At most one filename argument is allowed.")
        }
        // In qemu-img's order: texts that cannot be read come before what is missing.
        let options = try CreationOptions(options.map(\.bytes))
        let snapshot = try snapshot.map(SnapshotName.option)
        var measurement = Measurement(try disk())
        guard let format = ImageFormat.named(targetFormat) else {
            throw .invalid("Unknown file format '\(targetFormat)'")
        }
        measurement.targetFormat = format
        measurement.options = options
        measurement.snapshot = snapshot
        measurement.access = try access.access()
        measurement.options.secrets = measurement.access.options.secrets
        return measurement
    }

    private func disk() throws(ImageError) -> Measurement.Disk {
        let bytes = try size.map { text throws(ImageError) in
            try Int64.sizeArgument(text, name: "image size")
        }
        let isAboutImage =
            sourceFormat != nil || snapshot != nil || access.areOptions
        guard !files.isEmpty || !isAboutImage else {
            throw .invalid("--image-opts, -f, and -l require a filename argument.")
        }
        switch (files.first, bytes) {
        case (nil, nil): throw .invalid("Either --size N or one filename must be specified.")
        case (_?, _?):
            throw .invalid("--size N cannot be used together with a filename.")
        case (nil, let bytes?): return .empty(bytes)
        case (let path?, nil):
            return .image(
                try access.name(path, format: sourceFormat),
                try sourceFormat.map { name throws(ImageError) in
                    try ImageFormat.option(name, of: path)
                })
        }
    }

    private static func text(_ result: MeasuredSize) -> String {
        let bitmaps = result.bitmaps.map { "bitmaps size: \($0)\n" } ?? ""
        return "required size: \(result.required)\n"
            + "fully allocated size: \(result.fullyAllocated)\n" + bitmaps
    }

    private static func json(_ result: MeasuredSize) -> String {
        let bitmaps = result.bitmaps.map { [JSONValue.Member("bitmaps", .integer($0))] } ?? []
        return JSONValue.object(
            bitmaps + [
                .init("required", .integer(result.required)),
                .init("fully-allocated", .integer(result.fullyAllocated)),
            ]
        ).text + "\n"
    }
}
