import ArgumentParser
import DiskImage
import Glibc
import ImageDrivers
import ImageFormats
import ImageTools

struct MapCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "map",
        abstract: "Show which parts of a disk lie in which places of which files.",
        discussion: """
            For people: the parts that lie in files (human), or the whole disk as a picture in the \
            terminal (picture), which --svg writes to a file. For programs: json.

            Example: swimg map --output=json disk.qcow2

            Example: swimg map --output=picture --svg disk.svg disk.qcow2
            """)

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the image (default: found out).", valueName: "format"))
    var format: String?

    @Option(help: ArgumentHelp("Output form: human, json or picture.", valueName: "form"))
    var output = "human"

    @Option(
        name: [.customShort("s"), .customLong("start-offset")], parsing: .unconditional,
        help: ArgumentHelp("Begin here on the disk (k, M, G, …).", valueName: "offset"))
    var startOffset: String?

    @Option(
        name: [.customShort("l"), .customLong("max-length")], parsing: .unconditional,
        help: ArgumentHelp("Show no more of the disk than this.", valueName: "length"))
    var maxLength: String?

    @Option(help: ArgumentHelp("Write the picture to this file.", valueName: "file"))
    var svg: ImageName?

    @OptionGroup var access: SourceOptions

    @Argument(help: ArgumentHelp("The image.", valueName: "file"))
    var files: [ImageName] = []

    func run(_ signals: Signals) async throws {
        guard files.count == 1 else {
            throw CommandLineWords.mistake("Expecting one image file name")
        }
        let name = try access.name(files[0], format: format)
        guard ["human", "json", "picture"].contains(output) else {
            throw ImageError.invalid(
                "invalid output form '\(output)': --output takes human, json or picture"
            ).asQemu("--output must be used with human or json as argument.")
        }
        guard svg == nil || output == "picture" else {
            throw ImageError.invalid("--svg can only be used with --output=picture")
        }
        let start = try startOffset.map { try Int64.sizeArgument($0, name: "start offset") } ?? 0
        let length = try maxLength.map { try Int64.sizeArgument($0, name: "max length") } ?? .max
        let range = start..<start + min(length, .max - start)
        let opener = ImageOpener(try access.access())
        let known = try format.map { name throws(ImageError) in
            try ImageFormat.option(name, of: files[0])
        }
        try await signals.interrupting {
            let map = ImageMap(try await opener.openChain(name, format: known))
            if output == "picture" {
                try await draw(map, range)
            } else {
                try await list(map, range)
            }
        }
    }

    private func list(_ map: ImageMap, _ range: Range<Int64>) async throws {
        var printer = MapPrinter(
            output == "json" ? .json : .table, fileNames: map.fileNames,
            write: { Output.print($0) })
        do {
            if range.isEmpty || range.lowerBound >= map.guestSize {
                printer.addNothing(at: range.lowerBound)
            }
            try await map.forEachMapping(in: range) {
                try printer.add($0)
                try Output.checkReader()
            }
        } catch {
            printer.finish(isWhole: false)
            throw error
        }
        printer.finish()
    }

    /// Columns of a picture in a file, which does not depend on the width of the terminal.
    private static let columnsInFile = 144

    private func draw(_ map: ImageMap, _ range: Range<Int64>) async throws {
        let screen = TerminalScreen()
        let shown =
            min(range.lowerBound, map.guestSize)..<min(range.upperBound, map.guestSize)
        var picture = MapPicture(
            shown, layers: map.fileNames, columns: svg == nil ? screen.columns : Self.columnsInFile)
        try await map.forEachMapping(in: shown) { picture.add($0) }
        guard let svg else {
            return Output.print(
                picture.text(isColored: screen.isColored, isUnicode: screen.isUnicode))
        }
        try Output.write(picture.svg, toFile: svg.path())
    }
}

/// The capabilities of the terminal at standard output.
private struct TerminalScreen {
    let columns: Int
    let isColored: Bool
    let isUnicode: Bool

    init() {
        var size = winsize()
        let isTerminal = isatty(STDOUT_FILENO) == 1
        let isKnown =
            isTerminal && ioctl(STDOUT_FILENO, UInt(TIOCGWINSZ), &size) == 0 && size.ws_col > 0
        columns = isKnown ? Int(size.ws_col) : 80
        // Colour is off if NO_COLOR is set and not empty (https://no-color.org).
        isColored = isTerminal && (Self.setting("NO_COLOR") ?? "").isEmpty
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].compactMap(Self.setting).first { !$0.isEmpty }
        let encoding = (locale ?? "").uppercased().filter { $0 != "-" }
        isUnicode = encoding.hasSuffix("UTF8")
    }

    private static func setting(_ name: String) -> String? {
        getenv(name).map { String(cString: $0) }
    }
}
