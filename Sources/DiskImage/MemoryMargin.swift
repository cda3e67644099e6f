import Glibc

/// Memory that has to be left over.
///
/// Swift's arrays and strings cannot say that there is no memory for them: the process ends. So
/// what grows with the content of an image asks here first, and fails while there is still room to
/// say so.
public enum MemoryMargin {
    /// More than all tasks together need until they ask again, in bytes.
    private static let size = 16 << 20

    /// - Parameter byteCount: what is about to be needed, beside the margin.
    /// - Throws: `ImageError` if there is not as much memory to be had.
    public static func check(for byteCount: Int = 0) throws(ImageError) {
        // Pages that are never touched: the kernel counts them against the process's limit, and
        // that is all.
        let length = byteCount + size
        let pages = mmap(
            nil, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        guard pages != MAP_FAILED else { throw .outOfMemory() }
        munmap(pages, length)
    }
}
