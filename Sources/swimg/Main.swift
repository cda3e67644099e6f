import ArgumentParser
import CLinux
import DiskImage
import Glibc
import ImageStorage

/// The program: reads the command line, runs the command, turns errors into one line and a number.
@main
enum Main {
    static func main() {
        clinux_limit_malloc_arenas()
        raiseDescriptorLimit()
        // Both come back as errors of the write that met them.
        signal(SIGPIPE, SIG_IGN)
        signal(SIGXFSZ, SIG_IGN)
        do {
            let arguments = try CommandLineWords.normalized(
                Array(CommandLine.arguments.dropFirst()))
            var command = try Swimg.parseAsRoot(arguments)
            guard let long = command as? any SignalledCommand else { return try command.run() }
            run(long)
        } catch {
            end(with: error)
        }
    }

    /// On threads that may block; the pool of an asynchronous `main` would only be one more.
    private static func run(_ command: any SignalledCommand) -> Never {
        clinux_release_program_pages()
        let signals = Signals()
        Task(executorPreference: IOExecutor.shared) {
            do {
                try await command.run(signals)
                exit(0)
            } catch {
                end(with: error)
            }
        }
        signals.deliver()
    }

    private static func end(with error: any Error) -> Never {
        switch error {
        case let error as ImageError: fail(error.description)
        case let error as Interruption: exit(128 + error.signal)
        case _ where Swimg.exitCode(for: error) == .success:
            Output.print(Swimg.message(for: error) + "\n")
            exit(0)
        default: fail(ImageError.invalid(oneLine(Swimg.message(for: error))).description)
        }
    }

    /// A backing chain needs a descriptor for each of its files.
    private static func raiseDescriptorLimit() {
        var limit = rlimit()
        guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return }
        limit.rlim_cur = limit.rlim_max
        setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
    }

    /// Every refusal and failure exits 1, as qemu-img's do; argument parsers like other numbers.
    private static func fail(_ message: String) -> Never {
        Output.printError("\(ProgramName.called): \(message)\n")
        exit(1)
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

/// A command that works for a while and has to end cleanly when a signal comes.
protocol SignalledCommand: ParsableCommand, Sendable {
    func run(_ signals: Signals) async throws
}

struct Swimg: ParsableCommand {
    static let version = "0.1.0"

    static let configuration = CommandConfiguration(
        commandName: "swimg",
        abstract: "Converts disk images, as qemu-img does, and faster.",
        version: ProgramName.versionLine,
        subcommands: [ConvertCommand.self])

    func run() throws { throw ImageError.invalid("a command is needed (see swimg --help)") }
}

/// What the program was called as. Through a link named qemu-img it answers as one: callers look for
/// that name in messages, and for a version that they know in `--version`.
enum ProgramName {
    static let called: String = isQemuImg ? "qemu-img" : "swimg"

    static let versionLine: String =
        isQemuImg
        ? "qemu-img version 7.2.0 (swimg \(Swimg.version))" : "swimg version \(Swimg.version)"

    private static let isQemuImg =
        CommandLine.arguments.first?.split(separator: "/").last == "qemu-img"
}
