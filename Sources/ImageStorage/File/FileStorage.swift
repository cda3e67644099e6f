import CLinux
import Concurrency
import DiskImage
import Glibc
import Synchronization

/// A regular file or a block device.
public final class FileStorage: WritableStorage {
    public let name: String
    public let traits: StorageTraits
    /// The identity of the file under any name: device and inode (for a device node: the device).
    public let identity: FileIdentity
    public var file: FileIdentity? { identity }

    let descriptor: Int32
    let cacheMode: CacheMode
    private let knownSize: Atomic<Int64>
    /// Reads wait only for the storage, so twice their own time is enough to tell. Writes also wait
    /// for the lock of their file.
    public let readMeter = CallMeter(manyTimes: CallTimes.manyTimesAlone)
    public let writeMeter = CallMeter()
    /// The means that the file system has refused, which are not tried again.
    let refusedZeroing = Mutex<Set<ZeroMeans>>([])
    let sharing: Mutex<BlockSharing>
    /// Descriptor for the unaligned ends of direct writes; opened when first needed.
    let bufferedDescriptor = Mutex<Int32?>(nil)
    /// Set for regular files unless the cache mode is direct: their writes run one by one anyway.
    private let joiner: WriteJoiner?
    /// The last answer of SEEK_DATA and SEEK_HOLE, because sources ask for neighbouring ranges.
    private let lastExtent = Mutex<Extent?>(nil)

    /// Length in bytes of the longest write that does not go to the disk at once.
    private static let shortWrite = 1 << 20

    /// Opens an existing file or block device for reading.
    ///
    /// - Parameter shareForced: whether to read the file although another process writes it (`-U`).
    /// - Throws: `ImageError` if it is neither file nor block device, cannot be read, or is in use.
    public static func openSource(
        _ path: HostPath, cacheMode: CacheMode = .writeback, shareForced: Bool = false
    ) throws(ImageError) -> FileStorage {
        // O_NONBLOCK: a FIFO under this name must be refused, not waited for.
        let storage = try open(
            path, flags: O_RDONLY | O_NONBLOCK | (cacheMode.isDirect ? clinux_O_DIRECT : 0),
            cacheMode: cacheMode)
        if !shareForced {
            try ImageLock.acquire(storage.descriptor, storage.name, forWriting: false)
        }
        return storage
    }

    /// Opens an existing file or block device for writing in place.
    ///
    /// - Parameter mayCreate: whether to open as if a missing file were to be made, so that the
    ///   kernel can refuse files which others left in shared folders (`fs.protected_regular`).
    public static func openExistingTarget(
        _ path: HostPath, cacheMode: CacheMode, mayCreate: Bool = false
    ) throws(ImageError) -> FileStorage {
        let creation = mayCreate ? O_CREAT : 0
        let storage = try open(
            path, flags: O_RDWR | O_NONBLOCK | creation | cacheMode.openFlags, cacheMode: cacheMode)
        try ImageLock.acquire(storage.descriptor, storage.name, forWriting: true)
        return storage
    }

    private static func open(
        _ path: HostPath, flags: Int32, cacheMode: CacheMode
    ) throws(ImageError) -> FileStorage {
        do {
            let descriptor = try Syscall.open(path, flags: flags, mode: 0o644)
            return try FileStorage(
                adopting: descriptor, name: path.description, cacheMode: cacheMode,
                readsAsZero: false)
        } catch {
            guard cacheMode.isDirect, error.kind == .system(errno: EINVAL) else { throw error }
            throw ImageError(
                error.kind, path: path.description,
                "cannot open: the file system does not support O_DIRECT")
        }
    }

    /// Takes over an open descriptor, and closes it in `deinit` or if this fails.
    init(
        adopting descriptor: Int32, name: String, cacheMode: CacheMode, readsAsZero: Bool
    ) throws(ImageError) {
        let status: stat
        let size: Int64
        do {
            status = try Syscall.status(descriptor, name)
            size = try Self.size(descriptor, name, status)
        } catch {
            Glibc.close(descriptor)
            throw error
        }
        let isDevice = status.st_mode & S_IFMT == S_IFBLK
        self.descriptor = descriptor
        self.name = name
        self.cacheMode = cacheMode
        identity = FileIdentity(status)
        sharing = Mutex(BlockSharing(isWorthTrying: !isDevice))
        joiner =
            isDevice || cacheMode.isDirect
            ? nil
            : WriteJoiner(descriptor: descriptor, name: name, meter: writeMeter)
        knownSize = Atomic(size)
        traits = StorageTraits(
            isDevice: isDevice, readsAsZero: readsAsZero,
            hasHoles: !isDevice && Self.hasHoles(descriptor, status),
            writesOneByOne: joiner != nil)
    }

    /// Whether the file has holes. Blocks that were only reserved count, so a file can have all its
    /// blocks and no data. If there are none, this one call saves two for each range later.
    private static func hasHoles(_ descriptor: Int32, _ status: stat) -> Bool {
        guard status.st_size > 0 else { return false }
        if Int64(status.st_blocks) < Int64(status.st_size).dividedUp(by: 512) { return true }
        guard let hole = Syscall.retry({ lseek(descriptor, 0, clinux_SEEK_HOLE) }) else {
            return false
        }
        return hole < status.st_size
    }

    deinit {
        ImageLock.release(descriptor)
        Glibc.close(descriptor)
        bufferedDescriptor.withLock { if let other = $0 { _ = Glibc.close(other) } }
    }

    private static func size(
        _ descriptor: Int32, _ path: String, _ status: stat
    ) throws(ImageError) -> Int64 {
        let size: UInt64
        switch status.st_mode & S_IFMT {
        case S_IFREG: size = UInt64(bitPattern: Int64(status.st_size))
        case S_IFBLK:
            var bytes: UInt64 = 0
            guard clinux_device_size(descriptor, &bytes) == 0 else {
                throw Syscall.failure(path, "cannot get the size of the device")
            }
            size = bytes
        case S_IFDIR: throw Syscall.failure(path, "cannot open", errno: EISDIR)
        default:
            throw .unsupported(path, "cannot open: neither a regular file nor a block device")
        }
        guard size <= largestDiskSize else { throw .tooLarge("cannot open", path: path) }
        return Int64(size)
    }

    public var size: Int64 { knownSize.load(ordering: .relaxed) }

    /// Number of bytes that the file takes in its file system now; nil if the system does not say.
    public var allocatedSize: Int64? {
        guard let blocks = (try? Syscall.status(descriptor, name))?.st_blocks else { return nil }
        let (bytes, overflow) = Int64(blocks).multipliedReportingOverflow(by: 512)
        return overflow || bytes < 0 ? nil : bytes
    }

    public func read(into buffer: inout MutableRawSpan, at offset: Int64) async throws {
        let count = buffer.byteCount
        guard count > 0 else { return }
        // Cached bytes are read without sleeping, so no other thread has to take over the core.
        let isCached = !cacheMode.isDirect && !readMeter.isWaiting
        let done = try buffer.withUnsafeMutableBytes { pointer throws(ImageError) -> Int in
            cacheMode.isDirect
                ? try readDirect(into: pointer, at: offset)
                : try Syscall.read(
                    descriptor, name, into: pointer, at: offset, mayBeCached: isCached,
                    noting: readMeter.note)
        }
        guard done == count else {
            throw ImageError.beyondEnd(self, offset + Int64(done)..<offset + Int64(count))
        }
    }

    public func write(_ bytes: RawSpan, at offset: Int64) async throws {
        try await writeRuns([BufferRun(offset: offset, parts: [0..<bytes.byteCount])], of: bytes)
    }

    public func writeRuns(_ runs: [BufferRun], of bytes: RawSpan) async throws {
        // The span is borrowed until this call returns, so the memory stays alive.
        let memory = bytes.withUnsafeBytes { $0 }
        let writes = runs.map { run in
            PendingWrite(
                offset: run.offset,
                pieces: run.parts.map { UnsafeRawBufferPointer(rebasing: memory[$0]) })
        }.filter { $0.count > 0 }
        if let joiner {
            try await joiner.write(writes)
        } else {
            for write in writes {
                var position = write.offset
                for piece in write.pieces {
                    try writeNow(piece, at: position)
                    position += Int64(piece.count)
                }
            }
        }
        startWriteback(writes)
    }

    /// Lets the disk begin with what has been written, where a flush waits for the disk in the end.
    /// Short writes are mostly tables, which change again.
    private func startWriteback(_ writes: [PendingWrite]) {
        guard cacheMode == .writeback else { return }
        for write in writes where write.count > Self.shortWrite {
            clinux_start_writeback(descriptor, write.offset, Int64(write.count))
        }
    }

    func writeNow(_ bytes: UnsafeRawBufferPointer, at offset: Int64) throws(ImageError) {
        if cacheMode.isDirect {
            try writeDirect(bytes, at: offset)
        } else {
            try Syscall.write(descriptor, name, [bytes], at: offset, noting: writeMeter.note)
        }
    }

    public func extent(at offset: Int64, limit: Int64) async throws -> Extent {
        // Callers ask for neighbours.
        let last = lastExtent.withLock { $0 }
        let found = last?.range.contains(offset) == true ? last : nil
        let extent = found ?? allocatedExtent(at: offset)
        if found == nil { lastExtent.withLock { $0 = extent } }
        return Extent(
            range: offset..<min(extent.range.upperBound, limit), isHole: extent.isHole)
    }

    /// The extent that SEEK_DATA and SEEK_HOLE report: blocks that were only reserved count as
    /// holes. Everything counts as data if they report nothing: on devices, on file systems without
    /// them, and on any error (which reading will report).
    private func allocatedExtent(at offset: Int64) -> Extent {
        let everything = Extent(range: offset..<max(size, offset + 1), isHole: false)
        guard let data = seek(to: clinux_SEEK_DATA, from: offset) else {
            // ENXIO: no data from here to the end.
            return errno == ENXIO ? Extent(range: everything.range, isHole: true) : everything
        }
        if data > offset { return Extent(range: offset..<data, isHole: true) }
        guard let hole = seek(to: clinux_SEEK_HOLE, from: offset),
            hole > offset
        else { return everything }
        return Extent(range: offset..<hole, isHole: false)
    }

    private func seek(to what: Int32, from offset: Int64) -> Int64? {
        Syscall.retry { lseek(descriptor, off_t(offset), what) }.map(Int64.init)
    }

    public func truncate(to size: Int64) async throws {
        if traits.isDevice {
            guard size <= self.size else {
                throw Syscall.failure(
                    name, "the device is too small: \(self.size) bytes, needed are \(size)",
                    errno: ENOSPC)
            }
            return
        }
        // Some file systems can make files that are too large to be opened again.
        guard size <= largestDiskSize else {
            throw ImageError.tooLarge("cannot set the size to \(size) bytes", path: name)
        }
        // Skips ftruncate if writes have already made the file that long, because XFS would write
        // everything to the disk.
        let isThere = try Syscall.status(descriptor, name).st_size == size
        guard isThere || Syscall.retry({ ftruncate(descriptor, off_t(size)) }) != nil else {
            throw Syscall.failure(name, "cannot set the size to \(size) bytes")
        }
        knownSize.store(size, ordering: .relaxed)
    }

    public func requireSpace(_ bytes: Int64) throws {
        guard !traits.isDevice else { return }
        var space = statvfs()
        // A file system that counts no blocks (ramfs, tmpfs without a limit, some FUSE) cannot say
        // how many are free.
        guard fstatvfs(descriptor, &space) == 0, space.f_blocks > 0 else { return }
        // The reserve of a file system is for root only.
        let blocks = geteuid() == 0 ? space.f_bfree : space.f_bavail
        let (product, overflow) = UInt64(blocks).multipliedReportingOverflow(
            by: UInt64(space.f_frsize))
        guard !overflow, let free = Int64(exactly: product), free < bytes else { return }
        throw Syscall.failure(
            name, "needs \(bytes) bytes, the file system has \(free)", errno: ENOSPC)
    }

    /// Throws the errors that a file system reports only on close: NFS reports a full disk or quota
    /// then, in every cache mode. Closing a duplicate makes it report, and leaves the file open.
    func reportLateErrors() throws(ImageError) {
        let copy = fcntl(descriptor, F_DUPFD_CLOEXEC, 0)
        guard copy >= 0, Glibc.close(copy) == 0 || errno == EINTR else {
            throw Syscall.failure(name, "cannot store what was written")
        }
    }

    public func flush() async throws {
        guard cacheMode.flushes else { return }
        // One call serves both descriptors, because they have one inode.
        guard Syscall.retry({ fdatasync(descriptor) }) != nil else {
            throw Syscall.failure(name, "cannot flush to disk")
        }
    }
}

/// The identity of a file, whatever name it was opened by.
public struct FileIdentity: Hashable, Sendable {
    private let device: UInt64
    private let inode: UInt64

    init(_ status: stat) {
        if status.st_mode & S_IFMT == S_IFBLK {
            // Several device nodes can stand for one device.
            device = UInt64.max
            inode = UInt64(status.st_rdev)
        } else {
            device = UInt64(status.st_dev)
            inode = UInt64(status.st_ino)
        }
    }

    /// The identity of the file at a path, through symbolic links; nil if there is none.
    public init?(path: HostPath) {
        var status = stat()
        guard path.withCString({ stat($0, &status) }) == 0 else { return nil }
        self.init(status)
    }
}
