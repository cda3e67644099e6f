import ArgumentParser
import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage
import ImageTools

struct CheckCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "check",
        abstract: "Check a disk image for errors, and repair them.",
        discussion: """
            Exit status: 0 the image is sound, 2 it has errors, 3 it has only leaked clusters, 63 \
            images of its format cannot be checked, 1 the check failed.

            Example: swimg check -r leaks disk.qcow2
            """)

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the image (default: found out).", valueName: "format"))
    var format: String?

    @Option(
        name: .customLong("output"), parsing: .unconditional,
        help: ArgumentHelp("Output form: human or json.", valueName: "form"))
    var output = "human"

    @Option(
        name: [.customShort("r"), .customLong("repair")], parsing: .unconditional,
        help: ArgumentHelp(
            "Repair: leaks lowers refcounts that are too high, all repairs everything it can.",
            valueName: "what"))
    var repair: String?

    @Flag(name: [.customShort("q"), .customLong("quiet")], help: "Show nothing but errors.")
    var quiet = false

    @Option(
        name: [.customShort("T"), .customLong("cache")], parsing: .unconditional,
        help: ArgumentHelp("Cache mode of the image.", valueName: "mode"))
    var cache = "writeback"

    @OptionGroup var access: SourceOptions

    @Argument(help: ArgumentHelp("The image.", valueName: "file"))
    var files: [ImageName] = []

    private static let unsupportedStatus: Int32 = 63

    func run(_ signals: Signals) async throws {
        let isHuman = try !Output.isJSON(output)
        let show: @Sendable (String) -> Void = { [quiet] in if !quiet { Output.print($0) } }
        var check = try makeCheck()
        check.onMessage = { Output.printError($0 + "\n") }
        if isHuman { check.onRepaired = { show(CheckReport.repairedText($0)) } }
        try await signals.interrupting { [check] in
            guard let report = try await check.run() else {
                throw FailureWithStatus(
                    status: Self.unsupportedStatus,
                    cause: .invalid("This image format does not support checks"))
            }
            show(isHuman ? report.text : report.json.text + "\n")
            guard let status = report.status else { throw ImageError.invalid("Check failed") }
            if status != 0 { throw Verdict(status: status) }
        }
    }

    private func makeCheck() throws(ImageError) -> ImageCheck {
        guard let path = files.first, files.count == 1 else {
            throw CommandLineWords.mistake("Expecting one image file name")
        }
        var check = ImageCheck(try access.name(path, format: format))
        check.format = try format.map { name throws(ImageError) in
            try ImageFormat.option(name, of: path)
        }
        if let repair {
            guard let known = CheckRepair(rawValue: repair) else {
                throw CommandLineWords.mistake(
                    "Unknown option value for -r (expecting 'leaks' or 'all'): \(repair)")
            }
            check.repair = known
        }
        check.opener = ImageOpener(try access.access(cacheMode: try CacheMode.option(cache)))
        return check
    }
}
