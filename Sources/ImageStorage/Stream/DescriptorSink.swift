import Concurrency
import DiskImage
import Glibc
import Synchronization

/// A pipe that is written from front to back: standard output, or a FIFO.
public final class DescriptorSink: WritableStorage {
    /// Time in milliseconds after which a writer that waits asks whether it still should.
    private static let glance: Int32 = 100

    public let name: String
    public let file: FileIdentity?
    public let traits = StorageTraits(isStream: true)
    public let readMeter = CallMeter()
    public let writeMeter = CallMeter()
    /// nil for a FIFO that has no reader yet.
    private let descriptor: Mutex<Int32?>
    private let path: HostPath?
    private let position = Atomic<Int64>(0)

    /// The pipe that a target's name means: `-` is standard output. nil for other names.
    ///
    /// - Parameter protected: files that must not be written.
    /// - Throws: `ImageError` if standard output is closed, a terminal, or a file that is read.
    public static func named(
        _ path: HostPath, protecting protected: Set<FileIdentity>
    ) throws(ImageError) -> DescriptorSink? {
        if path.bytes == Array("-".utf8) {
            let sink = try DescriptorSink()
            if let file = sink.file, protected.contains(file) {
                throw ImageError(
                    .invalid, path: sink.name,
                    "cannot be the target: it is the source, or a file that the source reads")
            }
            return sink
        }
        return DescriptorStream.isFIFO(path) ? DescriptorSink(fifo: path) : nil
    }

    private init() throws(ImageError) {
        name = "-"
        path = nil
        var status = stat()
        guard fstat(STDOUT_FILENO, &status) == 0,
            [S_IFIFO, S_IFSOCK, S_IFREG, S_IFBLK].contains(status.st_mode & S_IFMT)
        else {
            throw .unsupported(name, "standard output is closed, or neither a pipe nor a file")
        }
        file = FileIdentity(status)
        // A pipe of our own may be set not to wait, so that Ctrl-C ends a writer whose reader
        // stands still. Standard output itself is shared with other programs.
        var own: Int32 = -1
        if status.st_mode & S_IFMT == S_IFIFO {
            own = open("/proc/self/fd/1", O_WRONLY | O_NONBLOCK | O_CLOEXEC)
        }
        if own < 0 { own = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3) }
        guard own >= 0 else { throw Syscall.failure(name, "cannot open") }
        descriptor = Mutex(own)
    }

    private init(fifo path: HostPath) {
        name = path.description
        self.path = path
        file = nil
        descriptor = Mutex(nil)
    }

    deinit { descriptor.withLock { if let open = $0 { _ = Glibc.close(open) } } }

    /// Number of bytes that were written.
    public var size: Int64 { position.load(ordering: .relaxed) }

    public func write(_ bytes: RawSpan, at offset: Int64) async throws {
        guard offset == size else {
            throw ImageError.unsupported(
                name, "a pipe can only be written from front to back")
        }
        let descriptor = try opened()
        try bytes.withUnsafeBytes { memory in
            var rest = UnsafeRawBufferPointer(memory)
            while !rest.isEmpty {
                rest = UnsafeRawBufferPointer(rebasing: rest[try writeSome(rest, descriptor)...])
            }
        }
        position.add(Int64(bytes.byteCount), ordering: .relaxed)
    }

    /// - Returns: number of bytes written.
    private func writeSome(
        _ memory: UnsafeRawBufferPointer, _ descriptor: Int32
    ) throws -> Int {
        while true {
            try Task.checkCancellation()
            var state = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
            guard IOExecutor.mayBlock({ poll(&state, 1, Self.glance) }) > 0 else { continue }
            let count = IOExecutor.mayBlock {
                Glibc.write(descriptor, memory.baseAddress, memory.count)
            }
            if count >= 0 { return count }
            guard errno == EINTR || errno == EAGAIN else {
                throw Syscall.failure(name, "cannot write")
            }
        }
    }

    /// Opens a FIFO as soon as it has a reader.
    private func opened() throws -> Int32 {
        if let known = descriptor.withLock({ $0 }) { return known }
        while true {
            try Task.checkCancellation()
            let opened = path?.withCString { open($0, O_WRONLY | O_NONBLOCK | O_CLOEXEC) } ?? -1
            if opened >= 0 {
                descriptor.withLock { $0 = opened }
                return opened
            }
            guard errno == ENXIO || errno == EINTR else {
                throw Syscall.failure(name, "cannot open")
            }
            _ = IOExecutor.mayBlock { poll(nil, 0, Self.glance) }
        }
    }

    private static let zeros = [UInt8](repeating: 0, count: 64 << 10)

    public func zero(_ range: Range<Int64>, mayUnmap: Bool) async throws {
        var offset = range.lowerBound
        while offset < range.upperBound {
            let count = min(Int64(Self.zeros.count), range.upperBound - offset)
            try await write(Self.zeros.span.bytes.extracting(0..<Int(count)), at: offset)
            offset += count
        }
    }

    public func truncate(to size: Int64) async throws {}

    public func requireSpace(_ bytes: Int64) throws {}

    public func flush() async throws {}

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        throw ImageError.unsupported(name, "a pipe that is written cannot be read")
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        throw ImageError.unsupported(name, "a pipe that is written cannot be read")
    }
}
