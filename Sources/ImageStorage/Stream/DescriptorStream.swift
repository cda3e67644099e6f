import Concurrency
import DiskImage
import Glibc

/// The bytes that come from a pipe: standard input, or a FIFO.
public final class DescriptorStream: ByteStream {
    /// Time in milliseconds after which a reader that waits asks whether it still should.
    private static let glance: Int32 = 100

    private let descriptor: Int32
    private let isOwned: Bool
    public let name: String
    /// The file that standard input comes from, if it is one.
    public let file: FileIdentity?

    /// Standard input.
    ///
    /// - Throws: `ImageError` if it is closed, or a terminal.
    public init() throws(ImageError) {
        descriptor = STDIN_FILENO
        isOwned = false
        name = "-"
        var status = stat()
        guard fstat(descriptor, &status) == 0,
            [S_IFIFO, S_IFSOCK, S_IFREG, S_IFBLK].contains(status.st_mode & S_IFMT)
        else {
            throw .unsupported(name, "standard input is closed, or neither a pipe nor a file")
        }
        file = FileIdentity(status)
    }

    /// A FIFO. Waits for a writer when it is read, not here.
    public init(fifo path: HostPath) throws(ImageError) {
        name = path.description
        file = nil
        isOwned = true
        descriptor = path.withCString { open($0, O_RDONLY | O_NONBLOCK | O_CLOEXEC) }
        guard descriptor >= 0 else { throw Syscall.failure(name, "cannot open") }
    }

    deinit { if isOwned { close(descriptor) } }

    /// Whether a path is that of a FIFO.
    public static func isFIFO(_ path: HostPath) -> Bool {
        var status = stat()
        return path.withCString { stat($0, &status) } == 0 && status.st_mode & S_IFMT == S_IFIFO
    }

    /// The size of what comes is unknown.
    public var progress: StreamProgress? { nil }

    public func read(into buffer: inout MutableRawSpan) async throws -> Int {
        try buffer.withUnsafeMutableBytes { memory in
            var count = 0
            while count < memory.count {
                let room = UnsafeMutableRawBufferPointer(rebasing: memory[count...])
                let taken = try readSome(into: room)
                if taken == 0 { break }
                count += taken
            }
            return count
        }
    }

    /// - Returns: number of bytes; 0 at the end.
    private func readSome(into memory: UnsafeMutableRawBufferPointer) throws -> Int {
        while true {
            // A task that is cancelled must not wait for a writer that never comes.
            try Task.checkCancellation()
            var state = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
            guard IOExecutor.mayBlock({ poll(&state, 1, Self.glance) }) > 0 else { continue }
            let count = Glibc.read(descriptor, memory.baseAddress, memory.count)
            if count >= 0 { return count }
            guard errno == EINTR || errno == EAGAIN else {
                throw Syscall.failure(name, "cannot read")
            }
        }
    }
}
