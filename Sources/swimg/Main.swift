import ArgumentParser
import CLinux
import Concurrency
import DiskImage
import Glibc
import ImageStorage

/// The program: reads the command line, runs the command, turns errors into one line and a number.
@main
enum Main {
    static func main() {
        // Before anything is opened.
        guard clinux_open_standard_descriptors() == 0 else { leave(1) }
        clinux_limit_malloc_arenas()
        raiseDescriptorLimit()
        // Both come back as errors of the write that met them.
        PipeSignal.ignore()
        signal(SIGXFSZ, SIG_IGN)
        do {
            let words = ArgumentBytes.commandLine().dropFirst().map(ArgumentBytes.escaped)
            // Programs ask for it again and again, and the parser takes longer than the rest of us.
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

    /// A verb by itself is parsed in less time than the program with all its verbs. What is wrong, and help, the
    /// parser puts better when it knows the whole.
    private static func parsed(_ arguments: [String]) throws -> any ParsableCommand {
        if let type = Swimg.command(named: arguments.first),
            let command = try? type.parse(Array(arguments.dropFirst()))
        {
            return command
        }
        return try Swimg.parseAsRoot(arguments)
    }

    /// On threads that may block; the pool of an asynchronous `main` would only be one more.
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
        case let error as ImageError: fail(error.description)
        case let error as Interruption: leave(128 + error.signal)
        case let error as Verdict: leave(error.status, failure: failure)
        case is OutputFailure: leave(failure, failure: failure)
        case let error as FailureWithStatus: fail(error.cause.description, status: error.status)
        case _ where Swimg.exitCode(for: error) == .success:
            Output.print(success(Swimg.message(for: error)))
            leave(0)
        default: fail(ImageError.invalid(oneLine(Swimg.message(for: error))).description)
        }
    }

    /// The parser's answer to a question of the command line: help, a version, a script for shells.
    private static func success(_ message: String) -> String {
        let isHelp = message.hasPrefix("OVERVIEW: ")
        guard ProgramName.isQemuImg, isHelp else { return message + "\n" }
        // `help VERB` is the parser's other form of `VERB --help`.
        let verb = ArgumentBytes.commandLine().dropFirst().map(\.text).first { $0 != "help" }
        return QemuImgHelp.text(verb: verb)
    }

    /// A backing chain needs a descriptor for each of its files.
    private static func raiseDescriptorLimit() {
        var limit = rlimit()
        guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return }
        limit.rlim_cur = limit.rlim_max
        setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
    }

    /// Nearly every refusal and failure exits 1, as qemu-img's do; argument parsers like other numbers.
    private static func fail(_ message: String, status: Int32 = 1) -> Never {
        Output.printError("\(ProgramName.called): \(ArgumentBytes.readable(message))\n")
        _exit(status)
    }

    /// At once: `exit` would take libraries apart that other threads are still in. One that says goodbye to an NBD
    /// server then finds libnbd without its errors, and libnbd aborts. `Output` has nothing left to write.
    ///
    /// - Parameter failure: the status if standard output did not take what was printed, whatever
    ///   was found out.
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

/// A signal that ended a command.
struct Interruption: Error {
    let signal: Int32
}

/// What a command found out, where the exit status tells it: images differ, an image has leaks.
struct Verdict: Error {
    let status: Int32
}

/// A failure of a command whose callers know other numbers than 1.
struct FailureWithStatus: Error {
    let status: Int32
    let cause: ImageError
}

/// A verb of qemu-img.
protocol ImageCommand: ParsableCommand, Sendable {
    static var letters: OptionLetters { get }
    /// The exit status where nothing was found out.
    static var failureStatus: Int32 { get }

    /// Does the work, ends cleanly when a signal comes; what it throws is the end of the program.
    func run(_ signals: Signals) async throws
}

extension ImageCommand {
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
        CheckCommand.self, CompareCommand.self, ConvertCommand.self, CreateCommand.self,
        DdCommand.self, DigestCommand.self, InfoCommand.self, MapCommand.self,
        MeasureCommand.self, ResizeCommand.self,
    ]

    static func command(named verb: String?) -> (any ImageCommand.Type)? {
        commands.first { $0.configuration.commandName == verb }
    }

    func run() throws { throw ImageError.invalid("a command is needed (see swimg --help)") }
}

/// What the program was called as. Through a link named qemu-img it answers as one: callers look for
/// that name in messages, and for a version that they know in `--version`.
enum ProgramName {
    static let called: String = isQemuImg ? "qemu-img" : "swimg"

    static let versionLine: String =
        isQemuImg
        ? "qemu-img version 7.2.0 (swimg \(Swimg.version))" : "swimg version \(Swimg.version)"

    static let isQemuImg =
        ArgumentBytes.commandLine().first.map { HostPath(bytes: $0).fileName.text } == "qemu-img"
}
