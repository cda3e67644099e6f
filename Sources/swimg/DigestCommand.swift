import ArgumentParser
import DiskImage
import ImageConvert
import ImageDrivers
import ImageFormats
import ImageTools

struct DigestCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "digest",
        abstract: "Print the digest of a disk image's content.",
        discussion: """
            The digest of a guest disk is the same in every format, sparse or compressed or \
            neither. The default, blkhash, is the one that blksum prints; it is computed on all \
            cores, and zeros cost no time. sha256 is the one that sha256sum prints for the raw disk.

            Example: swimg digest -f qcow2 disk.qcow2
            """)

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the image (default: found out).", valueName: "format"))
    var format: String?

    @Option(help: .algorithm)
    var algorithm: String?

    @Flag(name: [.customShort("p"), .customLong("progress")], help: "Show progress.")
    var progress = false

    @Option(help: ArgumentHelp("Output form: human or json.", valueName: "form"))
    var output = "human"

    @OptionGroup var access: SourceOptions

    @Argument(help: ArgumentHelp("The image.", valueName: "file"))
    var files: [ImageName] = []

    func run(_ signals: Signals) async throws {
        guard files.count == 1, let path = files.first else {
            throw CommandLineWords.mistake("Expecting one image file name")
        }
        let isJSON = try Output.isJSON(output)
        let printer = ProgressPrinter(isShown: progress)
        var job = GuestDigest(try access.name(path, format: format))
        job.format = try format.map { name throws(ImageError) in
            try ImageFormat.option(name, of: path)
        }
        job.algorithm = try algorithm.map(DigestAlgorithm.option) ?? .blkhash
        job.access = try access.access()
        job.onProgress = { done, total in printer.update(done: done, total: total) }
        let result = try await signals.interrupting(showing: printer) { [job] in
            try await job.run()
        }
        Output.print(
            isJSON
                ? Self.json(path, result)
                : "\(result)  \(path.description.withoutControlCharacters)\n")
    }

    private static func json(_ name: ImageName, _ digest: DiskDigest) -> String {
        JSONValue.object([
            .init("filename", .string(name.description)),
            .init("algorithm", .string(digest.algorithm.rawValue)),
            .init("digest", .string(digest.hexadecimal)),
        ]).text + "\n"
    }
}
