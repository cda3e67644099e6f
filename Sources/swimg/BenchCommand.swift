import ArgumentParser
import DiskImage
import ImageFormats
import ImageStorage
import ImageTools

struct BenchCommand: ImageCommand {
    static let configuration = CommandConfiguration(
        commandName: "bench",
        abstract: "Measure the time of many small reads or writes.",
        discussion: """
            The requests begin at one offset, and each is one step behind the one before; at the \
            end of the disk they begin at its start again. -w overwrites the disk.

            Example: swimg bench -f qcow2 -c 10000 -s 64k disk.qcow2

            Example: swimg bench -w -f raw -t none --flush-interval=64 scratch.raw
            """)

    @Option(
        name: [.customShort("c"), .customLong("count")], parsing: .unconditional,
        help: ArgumentHelp("Number of requests.", valueName: "number"))
    var count = "75000"

    @Option(
        name: [.customShort("d"), .customLong("depth")], parsing: .unconditional,
        help: ArgumentHelp("Number of requests in flight.", valueName: "number"))
    var depth = "64"

    @Option(
        name: [.customShort("f"), .customLong("format")], parsing: .unconditional,
        help: ArgumentHelp("The format of the image (default: found out).", valueName: "format"))
    var format: String?

    @Option(
        name: .customLong("flush-interval"), parsing: .unconditional,
        help: ArgumentHelp(
            "Flush after so many writes, when all of them are done.", valueName: "number"))
    var flushInterval = "0"

    @Flag(name: .customLong("no-drain"), help: "Flush while writes are in flight.")
    var noDrain = false

    @Option(
        name: [.customShort("o"), .customLong("offset")], parsing: .unconditional,
        help: ArgumentHelp("Offset of the first request (k, M, G, …).", valueName: "offset"))
    var offset = "0"

    @Option(
        name: [.customShort("s"), .customLong("buffer-size")], parsing: .unconditional,
        help: ArgumentHelp("Length of each request (k, M, G).", valueName: "size"))
    var bufferSize = "4096"

    @Option(
        name: [.customShort("S"), .customLong("step-size")], parsing: .unconditional,
        help: ArgumentHelp(
            "Distance from one request to the next (default: their length).", valueName: "size"))
    var stepSize = "0"

    @Flag(
        name: [.customShort("w"), .customLong("write")],
        help: "Write; the default is to read.")
    var writes = false

    @Option(
        parsing: .unconditional,
        help: ArgumentHelp("The byte to write.", valueName: "byte"))
    var pattern = "0"

    @Option(
        name: [.customShort("t"), .customLong("cache")], parsing: .unconditional,
        help: ArgumentHelp("Cache mode: \(CacheMode.names).", valueName: "mode"))
    var cache = "writeback"

    @Option(
        name: [.customShort("i"), .customLong("aio")], parsing: .unconditional,
        help: ArgumentHelp(
            "Accepted, without an effect: threads, native or io_uring.", valueName: "way"))
    var aio: String?

    @Flag(
        name: [.customShort("n"), .customLong("native")], help: "Accepted, without an effect.")
    var native = false

    @Flag(
        name: [.customShort("q"), .customLong("quiet")], help: "Accepted, without an effect.")
    var quiet = false

    @OptionGroup var access: SourceOptions

    @Argument(help: ArgumentHelp("The image.", valueName: "file"))
    var files: [ImageName] = []

    func run(_ signals: Signals) async throws {
        var bench = try makeBench()
        bench.onOpened = { [bench] in Output.print(Self.announcement(bench)) }
        let time = try await signals.interrupting { [bench] in try await bench.run() }
        let thousandths = Int((time / .milliseconds(1)).rounded())
        let rest = String(thousandths % 1000 + 1000).dropFirst()
        Output.print("Run completed in \(thousandths / 1000).\(rest) seconds.\n")
    }

    private static func announcement(_ bench: ImageBench) -> String {
        let kind = bench.pattern == nil ? "read" : "write"
        let flushes = bench.flushInterval.map { "Sending flush every \($0) requests\n" } ?? ""
        return "Sending \(bench.count) \(kind) requests, \(bench.length) bytes each, "
            + "\(bench.depth) in parallel (starting at offset \(bench.offset), step size "
            + "\(bench.step ?? Int64(bench.length)))\n" + flushes
    }

    private func makeBench() throws(ImageError) -> ImageBench {
        let largest = Int64(Int32.max)
        guard aio.map(["threads", "native", "io_uring"].contains) ?? true else {
            throw .invalid("Invalid aio option: \(aio ?? "")")
        }
        let interval = try number(flushInterval, "flush interval", 0...largest)
        let depth = try number(depth, "queue depth", 1...largest)
        guard let mode = CacheMode(rawValue: cache) else { throw .invalid("Invalid cache mode") }
        let start = try Int64.sizeArgument(offset, name: "offset")
        let length = try Int64.sizeArgument(bufferSize, name: "buffer size", in: 1...largest)
        let step = try Int64.sizeArgument(stepSize, name: "step_size", in: 0...largest)
        let byte = try number(pattern, "pattern byte", 0...255)
        let count = try number(count, "request count", 0...largest)
        guard let file = files.first, files.count == 1 else {
            throw CommandLineWords.mistake("Expecting one image file name")
        }
        guard writes || interval == 0 else {
            throw .invalid("--flush-interval is only available in write tests")
        }
        guard interval == 0 || interval >= depth else {
            throw .invalid("Flush interval can't be smaller than depth")
        }
        guard !writes || !access.forceShare else {
            throw ImageError.invalid("force-share=on can only be used with read-only images")
                .opening(file.description)
        }
        var image = ImageInPlace(try access.name(file, format: format))
        image.format = try format.map { name throws(ImageError) in
            try ImageFormat.option(name, of: file)
        }
        image.access = try access.access(cacheMode: mode)
        image.onGuessedRaw = { Output.printError(ImageInPlace.guessedRawWarning(file.description)) }
        var bench = ImageBench(image)
        bench.count = count
        bench.depth = depth
        bench.offset = start
        bench.length = Int(length)
        bench.step = step == 0 ? nil : step
        bench.pattern = writes ? UInt8(byte) : nil
        bench.flushInterval = interval == 0 ? nil : interval
        bench.drainsOnFlush = !noDrain
        return bench
    }

    private func number(
        _ text: String, _ name: String, _ range: ClosedRange<Int64>
    ) throws(ImageError) -> Int {
        guard let number = Int64(asInC: text), range.contains(number) else {
            throw .invalid("Invalid \(name) specified")
        }
        return Int(number)
    }
}
