import ArgumentParser
import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage
import ImageTools

struct CompareCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "compare",
        abstract: "Find out whether two disk images have the same content.",
        discussion: """
            Formats may differ, and one image may be larger if its rest reads as zeros. Exit \
            status: 0 the same, 1 different, 2 an image cannot be opened, 3 its metadata or 4 its \
            data cannot be read.

            Example: swimg compare -f qcow2 -F raw disk.qcow2 disk.raw
            """)

    // Not 1, which means that the images differ.
    static let failureStatus: Int32 = 2

    @Option(
        name: [.customShort("f"), .customLong("a-format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the first image.", valueName: "format"))
    var firstFormat: String?

    @Option(
        name: [.customShort("F"), .customLong("b-format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the second image.", valueName: "format"))
    var secondFormat: String?

    @Option(
        name: [.customShort("T"), .customLong("cache")], parsing: .unconditional,
        help: ArgumentHelp("Cache mode of the images.", valueName: "mode"))
    var cache = "writeback"

    @Flag(
        name: [.customShort("s"), .customLong("strict")],
        help: "Sizes and allocation have to be the same, too.")
    var strict = false

    @Flag(name: [.customShort("p"), .customLong("progress")], help: "Show progress.")
    var progress = false

    @Flag(name: [.customShort("q"), .customLong("quiet")], help: "Show nothing but errors.")
    var quiet = false

    @OptionGroup var access: SourceOptions

    @Argument(help: ArgumentHelp("The two images.", valueName: "file"))
    var files: [ImageName] = []

    private static let isDifferent = Verdict(status: 1)

    func run(_ signals: Signals) async throws {
        let printer = ProgressPrinter(isShown: progress && !quiet)
        var comparison = try makeComparison()
        comparison.onProgress = { done, total in printer.update(done: done, total: total) }
        let result: Comparison.Result
        do {
            result = try await signals.interrupting(showing: printer) { [comparison] in
                try await comparison.run()
            } finish: { [quiet] result in
                printer.finish(
                    isWhole: result.difference == nil, with: quiet ? "" : Self.text(result))
            }
        } catch {
            switch error {
            case let failure as Comparison.Failure:
                throw FailureWithStatus(
                    status: Self.status(of: failure.step), cause: failure.cause)
            // Status 1 would say that the images differ.
            case let error as ImageError:
                throw FailureWithStatus(status: Self.failureStatus, cause: error)
            default: throw error
            }
        }
        if result.difference != nil { throw Self.isDifferent }
    }

    private static func status(of step: Comparison.Failure.Step) -> Int32 {
        switch step {
        case .opening: 2
        case .blockStatus: 3
        case .reading: 4
        }
    }

    /// The verdict in qemu-img's exact words, because programs look for them.
    private static func text(_ result: Comparison.Result) -> String {
        let warning =
            result.firstSize == result.secondSize ? "" : "Warning: Image size mismatch!\n"
        switch result.difference {
        case nil: return warning + "Images are identical.\n"
        case .size: return "Strict mode: Image size mismatch!\n"
        case .blockStatus(let offset):
            return "Strict mode: Offset \(offset) block status mismatch!\n"
        case .content(let offset):
            let isBehindOne = offset >= min(result.firstSize, result.secondSize)
            return (isBehindOne ? warning : "") + "Content mismatch at offset \(offset)!\n"
        }
    }

    private func makeComparison() throws -> Comparison {
        guard files.count == 2 else {
            throw CommandLineWords.mistake("Expecting two image file names")
        }
        var comparison: Comparison
        do {
            comparison = Comparison(
                try access.name(files[0], format: firstFormat),
                try access.name(files[1], format: secondFormat))
            comparison.firstFormat = try firstFormat.map { name throws(ImageError) in
                try ImageFormat.option(name, of: files[0])
            }
            comparison.secondFormat = try secondFormat.map { name throws(ImageError) in
                try ImageFormat.option(name, of: files[1])
            }
            comparison.access = try access.access(cacheMode: CacheMode.option(cache))
        } catch {
            throw FailureWithStatus(status: Self.failureStatus, cause: error)
        }
        comparison.isStrict = strict
        return comparison
    }
}
