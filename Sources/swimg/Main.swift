import ArgumentParser
import CLinux
import Concurrency
import DiskImage
import Glibc
import ImageStorage

/// Entry point: parses the command line, runs the command, turns an error into one line and an exit
/// status.
@main
enum Main {
    static func main() {
        // Must come before anything is opened, or a file could get descriptor 0, 1 or 2.
        guard clinux_open_standard_descriptors() == 0 else { leave(1) }
        clinux_limit_malloc_arenas()
        raiseDescriptorLimit()
        // With both signals ignored, the write that caused them reports an error instead.
        PipeSignal.ignore()
        signal(SIGXFSZ, SIG_IGN)
        do {
            let words = ArgumentBytes.commandLine().dropFirst().map(ArgumentBytes.escaped)
            // Programs ask for the version often, and the parser takes longer than everything else
            // here.
            if words == ["--version"] || words == ["-V"] {
                Output.print(ProgramName.versionLine + "\n")
                leave(0)
            }
            let arguments = try CommandLineWords.normalized(words)
            var command = try parsed(arguments)
            guard let verb = command as? any ImageCommand else { return try command.run() }
            run(verb)
        } catch {
            end(with: error)
        }
    }

    /// Parses the words. Parsing a single verb takes less time than parsing the program with all
    /// its verbs; only the whole program words errors and help well, so it is the fallback.
    private static func parsed(_ arguments: [String]) throws -> any ParsableCommand {
        if let type = Swimg.command(named: arguments.first),
            let command = try? type.parse(Array(arguments.dropFirst()))
        {
            return command
        }
        if ProgramName.isQemuImg, let verb = arguments.first, !verb.hasPrefix("-"), verb != "help",
            Swimg.command(named: verb) == nil
        {
            throw CommandLineWords.mistake("Command not found: \(verb)")
        }
        return try Swimg.parseAsRoot(arguments)
    }

    /// Runs a verb on the I/O threads, which may block; an asynchronous `main` would only add a
    /// second pool.
    private static func run(_ command: any ImageCommand) -> Never {
        let signals = Signals()
        let failure = type(of: command).failureStatus
        do { try IOExecutor.start() } catch { fail(error.description, status: failure) }
        Task(executorPreference: IOExecutor.shared) {
            do {
                try await command.run(signals)
                leave(0, failure: failure)
            } catch {
                end(with: error, failure: failure)
            }
        }
        signals.deliver()
    }

    /// - Parameter failure: see `leave`.
    private static func end(with error: any Error, failure: Int32 = 1) -> Never {
        switch error {
        case let error as ImageError: fail(error)
        case let error as Interruption: leave(128 + error.signal)
        case let error as Verdict: leave(error.status, failure: failure)
        case is OutputFailure: leave(failure, failure: failure)
        case let error as FailureWithStatus: fail(error.cause, status: error.status)
        case _ where Swimg.exitCode(for: error) == .success:
            Output.print(success(Swimg.message(for: error)))
            leave(0)
        default: fail(QemuImgHelp.parserError(oneLine(Swimg.message(for: error))))
        }
    }

    /// Converts the parser's successful answer (help, version, shell completion script) to the text
    /// to print.
    private static func success(_ message: String) -> String {
        let isHelp = message.hasPrefix("OVERVIEW: ")
        guard ProgramName.isQemuImg, isHelp else { return message + "\n" }
        // The parser accepts `help VERB` as well as `VERB --help`.
        let verb = ArgumentBytes.commandLine().dropFirst().map(\.text).first { $0 != "help" }
        return QemuImgHelp.text(verb: verb)
    }

    /// Raises the limit because a backing chain needs a descriptor for each file.
    private static func raiseDescriptorLimit() {
        var limit = rlimit()
        guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return }
        limit.rlim_cur = limit.rlim_max
        setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
    }

    private static func fail(_ error: ImageError, status: Int32 = 1) -> Never {
        fail(ProgramName.isQemuImg ? error.qemuDescription : error.description, status: status)
    }

    /// Exits with 1 by default, as qemu-img does; the argument parser would use other numbers.
    private static func fail(_ message: String, status: Int32 = 1) -> Never {
        Output.printError("\(ProgramName.called): \(ArgumentBytes.readable(message))\n")
        _exit(status)
    }

    /// Exits with `_exit`: `exit` would tear down libraries that other threads still use. A thread
    /// that disconnects from an NBD server would then find libnbd's error state gone, and libnbd
    /// would abort. `Output` does not buffer, so nothing is lost.
    ///
    /// - Parameter failure: the status, instead of `status`, if a write to standard output failed.
    private static func leave(_ status: Int32, failure: Int32 = 1) -> Never {
        guard let code = Output.failure else { _exit(status) }
        if code == EPIPE { PipeSignal.end() }
        fail("cannot write the output: \(String(cString: strerror(code)))", status: failure)
    }

    private static func oneLine(_ message: String) -> String {
        let line = message.split(separator: "\n").first.map(String.init) ?? message
        return line.hasPrefix("Error: ") ? String(line.dropFirst("Error: ".count)) : line
    }
}

/// The signal that ended a command.
struct Interruption: Error {
    let signal: Int32
}

/// A result that the exit status reports: images differ, an image has leaks.
struct Verdict: Error {
    let status: Int32
}

/// A failure with an exit status other than 1 that callers know.
struct FailureWithStatus: Error {
    let status: Int32
    let cause: ImageError
}

/// A verb of qemu-img.
protocol ImageCommand: ParsableCommand, Sendable {
    /// Letters and long names of options that qemu-img's verb has and this one does not support
    /// yet.
    static var unsupportedOptions: [String] { get }
    /// Whether a word such as `-10G` is a size, not an option.
    static var hasSignedSize: Bool { get }
    /// The exit status if the command fails before it has a result.
    static var failureStatus: Int32 { get }

    /// Does the work and cleans up when a signal arrives. Any error it throws ends the program.
    func run(_ signals: Signals) async throws
}

extension ImageCommand {
    static var unsupportedOptions: [String] { [] }
    static var hasSignedSize: Bool { false }
    static var failureStatus: Int32 { 1 }
}

struct Swimg: ParsableCommand {
    static let version = "0.1.0"

    static let configuration = CommandConfiguration(
        commandName: "swimg",
        abstract: "Converts disk images, as qemu-img does, and faster.",
        version: ProgramName.versionLine,
        subcommands: commands.map { $0 })

    static let commands: [any ImageCommand.Type] = [
        AmendCommand.self, BenchCommand.self, BitmapCommand.self, CheckCommand.self,
        CommitCommand.self, CompareCommand.self, ConvertCommand.self, CreateCommand.self,
        DdCommand.self, DigestCommand.self, InfoCommand.self, MapCommand.self, MeasureCommand.self,
        RebaseCommand.self, ResizeCommand.self, SnapshotCommand.self,
    ]

    static func command(named verb: String?) -> (any ImageCommand.Type)? {
        commands.first { $0.configuration.commandName == verb }
    }

    func run() throws {
        throw ImageError.invalid("a command is needed (see swimg --help)")
            .asQemu("Not enough arguments", hint: QemuImgHelp.pointer)
    }
}

/// The name under which the program runs. If called through a link named qemu-img, it answers as
/// qemu-img: callers look for that name in messages and for a known version in `--version`.
enum ProgramName {
    static let called: String = isQemuImg ? "qemu-img" : "swimg"

    static let versionLine: String =
        isQemuImg
        ? "qemu-img version 7.2.0 (swimg \(Swimg.version))" : "swimg version \(Swimg.version)"

    static let isQemuImg =
        ArgumentBytes.commandLine().first.map { HostPath(bytes: $0).fileName.text } == "qemu-img"
}
