import ArgumentParser
import DiskImage
import ImageConvert
import ImageDrivers
import ImageFormats

struct DdCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "dd",
        abstract: "Copy a part of a disk image.",
        discussion: """
            Operands: if=file of=file bs=size count=blocks skip=blocks. As with qemu-img, count= \
            counts from the start of the source, with the skipped blocks: count=10 skip=4 copies \
            six.

            Example: swimg dd -f qcow2 -O raw bs=1M count=64 if=disk.qcow2 of=start.raw
            """)

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the source (default: found out).", valueName: "format"))
    var sourceFormat: String?

    @Option(
        name: [.customShort("O"), .customLong("output-format")], parsing: .unconditional,
        help: ArgumentHelp(
            "The format of the target: \(ImageFormat.creatableNames).", valueName: "format"))
    var targetFormat = "raw"

    @OptionGroup var access: SourceOptions

    @Argument(help: ArgumentHelp("An operand, as key=value.", valueName: "operand"))
    var operands: [OptionText] = []

    func run(_ signals: Signals) async throws {
        var conversion = try makeConversion()
        conversion.onWarning = { Output.printError("\(ProgramName.called): \($0)\n") }
        try await signals.interrupting { [conversion] in try await conversion.run() }
    }

    private func makeConversion() throws(ImageError) -> Conversion {
        var slice = BlockSlice()
        var source: ImageName?
        var target: ImageName?
        for operand in operands {
            let sides = OptionWords.sides(of: operand.bytes)
            let value = sides?.value ?? []
            switch sides?.key {
            case "if": source = ImageName(bytes: value)
            case "of": target = ImageName(bytes: value)
            case "bs":
                slice.blockSize = try Int64.sizeArgument(
                    value.text, name: "bs", in: 1...Int64(Int32.max))
            case "count": slice.count = try Int64.sizeArgument(value.text, name: "count")
            case "skip": slice.skip = try Int64.sizeArgument(value.text, name: "skip")
            default:
                let words = "unrecognized operand \(sides?.key ?? operand.bytes.text)"
                throw ImageError.invalid("\(words): there are if=, of=, bs=, count= and skip=")
                    .asQemu(words)
            }
        }
        guard let source, let target else {
            throw .invalid("Must specify both input and output files")
        }
        var conversion = Conversion(
            sources: [try access.name(source, format: sourceFormat)], target: target)
        conversion.sourceFormat = try sourceFormat.map { name throws(ImageError) in
            try ImageFormat.option(name, of: source)
        }
        do { conversion.targetFormat = try ImageFormat.option(targetFormat) } catch {
            throw error.asQemu("Unknown file format")
        }
        conversion.slice = slice
        conversion.shareForced = access.forceShare
        conversion.storageOptions = try access.storageOptions()
        conversion.options.secrets = conversion.storageOptions.secrets
        return conversion
    }
}
