import CLinux
import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// A command line in brackets, which starts a server for one conversion.
///
/// The server gets its socket as systemd hands sockets over (sd_listen_fds(3)), which nbdkit,
/// qemu-nbd and other servers understand.
public struct NBDServerCommand: Sendable, Equatable {
    /// The program and its arguments.
    public let words: [[UInt8]]

    /// The byte between the words of a name.
    private static let separator = ImageName.mark
    private static let start = [UInt8(ascii: "["), separator]

    public init(_ words: [[UInt8]]) { self.words = words }

    /// Parses a name; nil if it is not a command in brackets.
    public init?(name: ImageName) {
        guard let line = name.bytes.dropping(prefix: Self.start) else { return nil }
        words = line.split(separator: Self.separator, omittingEmptySubsequences: false)
            .map { Array($0) }
    }

    /// The command line as the name of a source or a target.
    public var name: ImageName {
        ImageName(bytes: Self.start + words.joined(separator: [Self.separator]))
    }

    /// The command line for messages.
    var text: String { "[ \(words.map(\.text).joined(separator: " ")) ]" }
}

/// A running server that was started for us, and ends with us.
final class NBDServer: Sendable {
    let address: NBDAddress
    /// The folder that holds the socket.
    private let folder: HostPath
    private let pid: pid_t
    private let text: String
    /// Status with which the server ended, once that has been fetched.
    private let status = Mutex<Int32?>(nil)

    init(_ command: NBDServerCommand) throws(ImageError) {
        text = command.text
        guard !command.words.isEmpty else {
            throw .invalid("[ ] is empty: it needs the command of an NBD server")
        }
        folder = try Self.makeFolder()
        let socket = Self.socket(in: folder)
        address = NBDAddress(
            uri: NBDAddress.unixURI(socket: socket.bytes, export: []), name: command.text)
        do {
            let listening = try Self.listen(socket)
            defer { _ = Glibc.close(listening) }
            pid = try Self.start(command.words, listening, command.text)
        } catch {
            Self.remove(folder)
            throw error
        }
    }

    deinit {
        if ended(within: 0) == nil {
            kill(pid, SIGTERM)
            var result: Int32 = 0
            // The server may have much to store, or ignore the signal.
            for _ in 0..<100 where waitpid(pid, &result, WNOHANG) == 0 { usleep(50_000) }
            kill(pid, SIGKILL)
            waitpid(pid, &result, WNOHANG)
        }
        Self.remove(folder)
    }

    /// Tells how the server ended; nil while it runs.
    ///
    /// - Parameter milliseconds: longest time to wait for the end.
    func ended(within milliseconds: Int) -> String? {
        status.withLock { known in
            if known == nil {
                var result: Int32 = 0
                for pause in 0...milliseconds / 10 {
                    if pause > 0 { usleep(10_000) }
                    if waitpid(pid, &result, WNOHANG) == pid {
                        known = result
                        break
                    }
                }
            }
            guard let result = known else { return nil }
            let signal = result & 0x7f
            return signal == 0
                ? "ended with status \(result >> 8 & 0xff)" : "was killed by signal \(signal)"
        }
    }

    /// Makes a folder for the socket in TMPDIR, or else in /tmp: the path of a socket has at most
    /// 107 bytes.
    private static func makeFolder() throws(ImageError) -> HostPath {
        if let chosen = getenv("TMPDIR"), chosen.pointee != 0 {
            let parent = HostPath(
                bytes: UnsafeRawBufferPointer(start: chosen, count: strlen(chosen)))
            if socket(in: folder(in: parent)).bytes.count < longestSocket,
                let folder = makeFolder(in: parent)
            {
                return folder
            }
        }
        guard let folder = makeFolder(in: "/tmp") else {
            throw Syscall.failure("/tmp", "cannot make a folder for the server's socket")
        }
        return folder
    }

    private static func makeFolder(in parent: HostPath) -> HostPath? {
        var template = folder(in: parent).bytes.map { CChar(bitPattern: $0) } + [0]
        guard mkdtemp(&template) != nil else { return nil }
        return HostPath(bytes: template.dropLast().map { UInt8(bitPattern: $0) })
    }

    private static func folder(in parent: HostPath) -> HostPath {
        HostPath(bytes: parent.bytes + Array("/swimg-XXXXXX".utf8))
    }

    private static func socket(in folder: HostPath) -> HostPath {
        HostPath(bytes: folder.bytes + Array("/socket".utf8))
    }

    private static func remove(_ folder: HostPath) {
        _ = socket(in: folder).withCString { unlink($0) }
        _ = folder.withCString { rmdir($0) }
    }

    /// Limit in bytes below which the path of a socket has to stay.
    private static let longestSocket = MemoryLayout.size(ofValue: sockaddr_un().sun_path)

    private static func listen(_ socketPath: HostPath) throws(ImageError) -> Int32 {
        let path = socketPath.description
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        guard socketPath.bytes.count < longestSocket else {
            throw Syscall.failure(path, "cannot make the server's socket", errno: ENAMETOOLONG)
        }
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: socketPath.bytes) }
        let descriptor = Glibc.socket(
            AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else {
            throw Syscall.failure(path, "cannot make the server's socket")
        }
        let size = socklen_t(MemoryLayout<sockaddr_un>.size)
        let bound = withUnsafePointer(to: &address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { bind(descriptor, $0, size) }
        }
        guard bound == 0, Glibc.listen(descriptor, SOMAXCONN) == 0 else {
            let error = Syscall.failure(path, "cannot make the server's socket")
            _ = Glibc.close(descriptor)
            throw error
        }
        return descriptor
    }

    private static func start(
        _ words: [[UInt8]], _ socket: Int32, _ text: String
    ) throws(ImageError) -> pid_t {
        // LISTEN_PID has to be the server's process id: the shell sets its own and becomes the
        // server. With setpriv (util-linux), the server also ends when this process is killed.
        let script = """
            export LISTEN_PID=$$ LISTEN_FDS=1
            command -v setpriv > /dev/null && exec setpriv --pdeathsig TERM -- "$@"
            exec "$@"
            """
        let shell = "/bin/sh"
        let line = [shell, "-c", script, "sh"].map { Array($0.utf8) } + words
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        // dup2 with equal numbers would keep close-on-exec, and exec would close the socket.
        let other = fcntl(socket, F_DUPFD_CLOEXEC, 10)
        guard other >= 0 else { throw Syscall.failure(text, "cannot start the server") }
        defer { _ = Glibc.close(other) }
        posix_spawn_file_actions_adddup2(&actions, other, 3)
        // The server's output goes to stderr, so that our output stays clean.
        posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO)
        // We block and ignore signals that the server has to get.
        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        defer { posix_spawnattr_destroy(&attributes) }
        var none = sigset_t()
        sigemptyset(&none)
        var defaults = sigset_t()
        sigemptyset(&defaults)
        sigaddset(&defaults, SIGPIPE)
        sigaddset(&defaults, SIGXFSZ)
        posix_spawnattr_setsigmask(&attributes, &none)
        posix_spawnattr_setsigdefault(&attributes, &defaults)
        posix_spawnattr_setflags(
            &attributes, Int16(POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF))

        var child = pid_t()
        var arguments: [UnsafeMutablePointer<CChar>?] = line.map { $0.withCString { strdup($0) } }
        arguments.append(nil)
        defer { for argument in arguments { free(argument) } }
        let problem = posix_spawn(
            &child, shell, &actions, &attributes, arguments, clinux_environment())
        guard problem == 0 else {
            throw Syscall.failure(text, "cannot start the server", errno: problem)
        }
        return child
    }
}
