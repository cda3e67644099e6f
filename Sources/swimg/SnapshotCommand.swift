import ArgumentParser
import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage
import ImageTools

struct SnapshotCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "snapshot",
        abstract: "List, take, apply or delete internal snapshots of a disk image.",
        discussion: """
            Snapshots are named by their id or name. An image with errors is refused and stays as \
            it is: check -r all repairs it.

            Example: swimg snapshot -c before-upgrade disk.qcow2

            Example: swimg snapshot -a before-upgrade disk.qcow2
            """)

    @Flag(
        name: [.customShort("l"), .customLong("list")], help: "List the snapshots (the default).")
    var lists = false

    @Option(
        name: [.customShort("a"), .customLong("apply")], parsing: .unconditional,
        help: ArgumentHelp(
            "Apply a snapshot: the disk becomes what it was then.", valueName: "snapshot"))
    var applied: OptionText?

    @Option(
        name: [.customShort("c"), .customLong("create")], parsing: .unconditional,
        help: ArgumentHelp("Take a snapshot of this name.", valueName: "snapshot"))
    var created: OptionText?

    @Option(
        name: [.customShort("d"), .customLong("delete")], parsing: .unconditional,
        help: ArgumentHelp("Delete a snapshot.", valueName: "snapshot"))
    var deleted: OptionText?

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the image (default: found out).", valueName: "format"))
    var format: String?

    @Flag(name: [.customShort("q"), .customLong("quiet")], help: "Show nothing but errors.")
    var quiet = false

    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "List the snapshots of an image that another process writes to.")
    var forceShare = false

    @OptionGroup var names: ImageNameOptions

    @Argument(help: ArgumentHelp("The image.", valueName: "file"))
    var files: [ImageName] = []

    func run(_ signals: Signals) async throws {
        guard let file = files.first, files.count == 1 else {
            throw CommandLineWords.mistake("Expecting one image file name")
        }
        let changes: [ImageSnapshots.Change] = [
            applied.map { .apply($0.bytes) }, created.map { .create($0.bytes) },
            deleted.map { .delete($0.bytes) },
        ].compactMap(\.self)
        guard changes.count + (lists ? 1 : 0) <= 1 else {
            throw CommandLineWords.mistake("Cannot mix '-l', '-a', '-c', '-d'")
        }
        let name = try names.name(file, format: format)
        let known = try format.map { name throws(ImageError) in
            try ImageFormat.option(name, of: file)
        }
        try await signals.interrupting {
            guard let change = changes.first else {
                return try await list(name, known)
            }
            guard !forceShare else {
                throw ImageError.invalid(
                    "-U cannot be used with -a, -c and -d: they need the image for themselves"
                ).asQemu("force-share=on can only be used with read-only images")
                    .opening(file.description)
            }
            var image = ImageInPlace(name)
            image.format = known
            image.onGuessedRaw = {
                Output.printError(ImageInPlace.guessedRawWarning(file.description))
            }
            try await ImageSnapshots(image, change).run()
        }
    }

    private func list(_ name: ImageName, _ format: ImageFormat?) async throws {
        let opener = ImageOpener(StorageAccess(shareForced: forceShare))
        guard let facts = try await opener.facts(name, format: format).first else { return }
        Output.print(InfoReport(facts).snapshotText)
    }
}
