import Glibc

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
        // The pages are never touched: the kernel only counts them against the process's limit.
        let length = byteCount + size
        let pages = mmap(
            nil, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        guard pages != MAP_FAILED else { throw .outOfMemory() }
        munmap(pages, length)
    }
}
