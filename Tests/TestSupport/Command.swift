import Foundation
import Glibc

/// The exit status and the output of a finished process.
public struct Outcome: Sendable, CustomStringConvertible {
    /// The status as a shell reports it: the exit status, or 128 plus the number of the fatal
    /// signal.
    public let status: Int32
    public let output: Data
    public let errors: Data
    public let command: String

    public var outputText: String { String(decoding: output, as: UTF8.self) }
    public var errorText: String { String(decoding: errors, as: UTF8.self) }
    public var isSuccess: Bool { status == 0 }

    public var description: String {
        "\(command)\n  status \(status)\n  output \(outputText.debugDescription)"
            + "\n  errors \(errorText.debugDescription)"
    }
}

public struct CommandError: Error, CustomStringConvertible {
    public let description: String

    public init(description: String) { self.description = description }
}

/// A started process. Its output goes to files, so it can never block on a reader.
public final class RunningProcess: @unchecked Sendable {
    public let pid: pid_t
    public let command: String
    private let scratch: TempFolder
    private var ended: Int32?

    public convenience init(
        _ program: String, _ arguments: [String], in folder: String? = nil,
        environment: [String: String] = [:], closed descriptors: [Int32] = []
    ) throws {
        try self.init(
            program, bytes: arguments.map { Array($0.utf8) }, in: folder, environment: environment,
            closed: descriptors)
    }

    /// - Parameter arguments: bytes, which need not be valid UTF-8.
    public init(
        _ program: String, bytes arguments: [[UInt8]], in folder: String? = nil,
        environment: [String: String] = [:], closed descriptors: [Int32] = []
    ) throws {
        scratch = try TempFolder()
        var line = [Array(program.utf8)] + arguments
        command = line.map { shellQuoted(String(decoding: $0, as: UTF8.self)) }
            .joined(separator: " ")
        if let folder { line = ["/usr/bin/env", "-C", folder].map { Array($0.utf8) } + line }
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
        let created = O_WRONLY | O_CREAT | O_TRUNC
        posix_spawn_file_actions_addopen(&actions, 1, scratch.path("stdout"), created, 0o600)
        posix_spawn_file_actions_addopen(&actions, 2, scratch.path("stderr"), created, 0o600)
        for descriptor in descriptors {
            posix_spawn_file_actions_addclose(&actions, descriptor)
        }
        // The harness may block or ignore signals that the program under test must receive.
        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        defer { posix_spawnattr_destroy(&attributes) }
        var none = sigset_t()
        var all = sigset_t()
        sigemptyset(&none)
        sigfillset(&all)
        posix_spawnattr_setsigmask(&attributes, &none)
        posix_spawnattr_setsigdefault(&attributes, &all)
        posix_spawnattr_setflags(
            &attributes, Int16(POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF))

        let settings = ProcessInfo.processInfo.environment.merging(environment) { $1 }
        var child = pid_t()
        let problem = withCStrings(line) { argv in
            withCStrings(settings.map { Array("\($0)=\($1)".utf8) }) { envp in
                posix_spawnp(&child, argv[0] ?? strdup(program), &actions, &attributes, argv, envp)
            }
        }
        guard problem == 0 else {
            throw CommandError(description: "\(line[0]): \(String(cString: strerror(problem)))")
        }
        pid = child
    }

    deinit {
        guard isRunning else { return }
        kill()
        _ = try? wait()
    }

    /// Standard output and standard error so far.
    public var output: Data { read("stdout") }
    public var errors: Data { read("stderr") }

    public func send(_ signal: Int32) {
        if ended == nil { Glibc.kill(pid, signal) }
    }

    public func kill() { send(SIGKILL) }

    public var isRunning: Bool { reap() == nil }

    /// Waits for the end; after `timeout` seconds the process is killed and an error is thrown.
    public func wait(timeout: Double = 60) throws -> Outcome {
        let start = ContinuousClock.now
        var pause: UInt32 = 200
        while reap() == nil {
            if ContinuousClock.now - start > .seconds(timeout) {
                kill()
                while reap() == nil { usleep(1000) }
                throw CommandError(description: "still running after \(timeout) s: \(command)")
            }
            usleep(pause)
            pause = min(pause * 2, 1000)
        }
        return Outcome(
            status: ended ?? -1, output: output, errors: errors, command: command)
    }

    /// Whether the process has this file open now.
    public func hasOpen(_ path: String) -> Bool {
        let folder = "/proc/\(pid)/fd"
        return TempFolder.names(in: folder).contains {
            (try? FileManager.default.destinationOfSymbolicLink(atPath: "\(folder)/\($0)")) == path
        }
    }

    /// Waits until `condition` holds or the process has ended; false after `timeout` seconds.
    public func wait(until condition: () -> Bool, timeout: Double = 20) -> Bool {
        let start = ContinuousClock.now
        while ContinuousClock.now - start < .seconds(timeout) {
            if condition() || !isRunning { return true }
            usleep(1000)
        }
        return false
    }

    private func reap() -> Int32? {
        if let ended { return ended }
        var status: Int32 = 0
        guard waitpid(pid, &status, WNOHANG) == pid else { return nil }
        let signal = status & 0x7f
        ended = signal == 0 ? (status >> 8) & 0xff : 128 + signal
        return ended
    }

    private func read(_ name: String) -> Data {
        FileManager.default.contents(atPath: scratch.path(name)) ?? Data()
    }
}

/// Runs a program and waits for its end.
@discardableResult
public func run(
    _ program: String, _ arguments: [String], in folder: String? = nil,
    environment: [String: String] = [:], timeout: Double = 60
) throws -> Outcome {
    var outcome: Outcome
    var attempts = 0
    repeat {
        outcome = try RunningProcess(program, arguments, in: folder, environment: environment)
            .wait(timeout: timeout)
        attempts += 1
        // qemu-img measures the processor for LUKS, and fails now and then where that is fast or
        // busy.
    } while attempts < 20 && outcome.errorText.contains("Unable to get accurate CPU usage")
    return outcome
}

/// Runs a program whose arguments need not be valid UTF-8 and waits for its end.
@discardableResult
public func run(
    _ program: String, bytes arguments: [[UInt8]], in folder: String? = nil, timeout: Double = 60
) throws -> Outcome {
    try RunningProcess(program, bytes: arguments, in: folder).wait(timeout: timeout)
}

/// Runs a program that must succeed for the test to make sense; returns its standard output.
@discardableResult
public func require(
    _ program: String, _ arguments: [String], in folder: String? = nil, timeout: Double = 60
) throws -> String {
    let outcome = try run(program, arguments, in: folder, timeout: timeout)
    guard outcome.isSuccess else { throw CommandError(description: outcome.description) }
    return outcome.outputText
}

extension String {
    /// The words of a command line that contains no quotes.
    public var words: [String] { split(separator: " ").map(String.init) }
}

public func shellQuoted(_ word: String) -> String {
    let plain = word.allSatisfy { $0.isLetter || $0.isNumber || "-_./=:,%+".contains($0) }
    return plain && !word.isEmpty
        ? word : "'" + word.replacingOccurrences(of: "'", with: "'\\''") + "'"
}

private func withCStrings<Result>(
    _ strings: [[UInt8]], _ body: ([UnsafeMutablePointer<CChar>?]) -> Result
) -> Result {
    let pointers = strings.map { strdup($0.map { CChar(bitPattern: $0) } + [0]) }
    defer { for pointer in pointers { free(pointer) } }
    return body(pointers + [nil])
}
