import ArgumentParser
import DiskImage
import ImageDrivers
import ImageFormats
import ImageTools

struct BitmapCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "bitmap",
        abstract: "Change a persistent bitmap of a disk image.",
        discussion: """
            The changes are made in the order in which they are given; either all of them or none.

            Example: swimg bitmap --add -g 64k disk.qcow2 since-backup

            Example: swimg bitmap --merge old -b base.qcow2 -F qcow2 disk.qcow2 since-backup
            """)

    @Flag(help: "Add the bitmap, enabled.")
    var add = false

    @Flag(help: "Remove the bitmap.")
    var remove = false

    @Flag(name: .customLong("remove-all"), help: "Remove all bitmaps of the image.")
    var removeAll = false

    @Flag(help: "Unset all of its bits.")
    var clear = false

    @Flag(help: "Let it record all writes to the image.")
    var enable = false

    @Flag(help: "Let it record no writes.")
    var disable = false

    @Option(
        parsing: .unconditionalSingleValue,
        help: ArgumentHelp("Set what another bitmap has set.", valueName: "bitmap"))
    var merge: [OptionText] = []

    @Option(
        name: [.customShort("b"), .customLong("source-file")], parsing: .unconditional,
        help: ArgumentHelp("The image with the bitmaps to merge.", valueName: "file"))
    var sourceFile: ImageName?

    @Option(
        name: [.customShort("F"), .customLong("source-format")], parsing: .unconditional,
        help: ArgumentHelp("The format of that image (default: found out).", valueName: "format"))
    var sourceFormat: String?

    @Option(
        name: [.customShort("g"), .customLong("granularity")], parsing: .unconditional,
        help: ArgumentHelp(
            "Bytes that one bit of an added bitmap stands for (default: a cluster, 4k to 64k).",
            valueName: "size"))
    var granularity: String?

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the image (default: found out).", valueName: "format"))
    var format: String?

    @OptionGroup var names: ImageNameOptions

    @Argument(help: ArgumentHelp("The image, then the bitmap.", valueName: "file"))
    var words: [ImageName] = []

    func run(_ signals: Signals) async throws {
        let wrongWords = ImageError.invalid("Expecting filename and bitmap name")
        guard let file = words.first, words.count <= 2 else { throw wrongWords }
        let actions = try actions()
        // All bitmaps need no name.
        guard words.count == 2 || actions.allSatisfy({ $0 == .removeAll }) else {
            throw wrongWords
        }
        let bitmap = words.count == 2 ? words[1].bytes : []
        var image = ImageInPlace(try names.name(file, format: format))
        image.format = try format.map { name throws(ImageError) in
            try ImageFormat.option(name, of: file)
        }
        image.onGuessedRaw = { Output.printError(ImageInPlace.guessedRawWarning(file.description)) }
        var bitmaps = ImageBitmaps(image, name: bitmap, actions)
        bitmaps.mergeSource = sourceFile
        bitmaps.mergeFormat = try sourceFormat.map { name throws(ImageError) in
            try ImageFormat.option(name, of: sourceFile)
        }
        try await signals.interrupting { [bitmaps] in try await bitmaps.run() }
    }

    /// The changes in the order of the command line, which the parser does not keep.
    private func actions() throws(ImageError) -> [BitmapChange.Action] {
        let size = try checkedGranularity()
        var merges = merge[...]
        var actions: [BitmapChange.Action] = []
        for word in ArgumentBytes.commandLine().map(\.text) {
            switch word {
            case "--add": actions.append(.add(granularity: size))
            case "--remove": actions.append(.remove)
            case "--remove-all": actions.append(.removeAll)
            case "--clear": actions.append(.clear)
            case "--enable": actions.append(.enable)
            case "--disable": actions.append(.disable)
            case _ where word == "--merge" || word.hasPrefix("--merge="):
                if let other = merges.popFirst() { actions.append(.merge(other.bytes)) }
            default: break
            }
        }
        guard !actions.isEmpty else {
            throw .invalid(
                "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
        }
        return actions
    }

    private func checkedGranularity() throws(ImageError) -> Int64? {
        guard add || granularity == nil else {
            throw .invalid("granularity only supported with --add")
        }
        guard sourceFile == nil || !merge.isEmpty else {
            throw .invalid("Merge bitmap source file only supported with --merge")
        }
        guard sourceFormat == nil || sourceFile != nil else {
            throw .invalid("-F only supported with -b")
        }
        return try granularity.map { text throws(ImageError) in
            try Int64(sizeOption: text, of: "granularity")
        }
    }
}
