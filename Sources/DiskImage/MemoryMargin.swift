import Glibc
import Synchronization

/// A margin of memory that has to stay free.
///
/// Swift's arrays and strings cannot report that there is no memory for them: the process ends. So
/// code whose memory grows with the content of an image checks here first, and fails while there is
/// still room for an error message.
public enum MemoryMargin {
    /// Margin in bytes: more than all tasks together need until they check again.
    private static let size = 16 << 20

    /// - Parameter byteCount: number of bytes about to be needed beside the margin.
    /// - Throws: `ImageError` if there is not enough memory.
    public static func check(for byteCount: Int = 0) throws(ImageError) {
        if let room = roomWithinLimits() {
            guard room >= byteCount + size else { throw .outOfMemory() }
            try tryOut(byteCount)
        } else {
            try tryOut(byteCount + size)
        }
    }

    /// Maps so many bytes for a moment. The pages are never touched: the kernel only counts them.
    ///
    /// Within a limit, the margin must not be tried out like this: for that moment it would be
    /// missing for the arrays of other threads.
    private static func tryOut(_ byteCount: Int) throws(ImageError) {
        guard byteCount > 0 else { return }
        let pages = mmap(
            nil, byteCount, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        guard pages != MAP_FAILED else { throw .outOfMemory() }
        munmap(pages, byteCount)
    }

    /// Held from the look at the memory to the allocation: several threads that have seen the same
    /// memory would use up the margin together.
    private static let taking = Mutex<Void>(())

    /// Allocates memory that must leave the margin alone.
    ///
    /// - Parameter byteCount: number of bytes that `allocate` takes.
    /// - Throws: `ImageError` if there is not enough memory; what `allocate` throws.
    public static func take<Memory>(
        _ byteCount: Int, _ allocate: () throws(ImageError) -> Memory
    ) throws(ImageError) -> Memory {
        try taking.withLock { _ throws(ImageError) in
            try check(for: byteCount)
            return try allocate()
        }
    }
}

// MARK: Limits of the process

extension MemoryMargin {
    /// The limits of the process in bytes (`ulimit -v`, `ulimit -d`); `Int.max` is none.
    private static let limits = (all: limit(RLIMIT_AS), data: limit(RLIMIT_DATA))

    private static func limit(_ resource: __rlimit_resource) -> Int {
        var limits = rlimit()
        guard getrlimit(__rlimit_resource_t(resource.rawValue), &limits) == 0 else { return .max }
        return Int(clamping: limits.rlim_cur)
    }

    /// The memory that the process may still get, in bytes; nil if it has no limit, or if the
    /// kernel does not tell what it has.
    ///
    /// Source: proc(5), `/proc/pid/statm`.
    private static func roomWithinLimits() -> Int? {
        guard limits.all < .max || limits.data < .max else { return nil }
        let file = open("/proc/self/statm", O_RDONLY | O_CLOEXEC)
        guard file >= 0 else { return nil }
        defer { close(file) }
        return withUnsafeTemporaryAllocation(of: UInt8.self, capacity: 256) { text in
            let length = read(file, text.baseAddress, text.count)
            guard length > 0 else { return nil }
            let pages = text.prefix(length).split(separator: UInt8(ascii: " ")).map {
                $0.reduce(0) { $0 * 10 + Int($1 &- UInt8(ascii: "0")) }
            }
            guard pages.count > 5 else { return nil }
            let page = sysconf(Int32(_SC_PAGESIZE))
            return min(limits.all - pages[0] * page, limits.data - pages[5] * page)
        }
    }
}
