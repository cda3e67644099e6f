import DiskImage
import Glibc

extension ImageError {
    /// The error for a size beyond `largestDiskSize`, with the system's text.
    public static func tooLarge(_ what: String, path: String? = nil) -> ImageError {
        Syscall.failure(path, what, errno: EFBIG)
    }
}

extension Int64 {
    /// The requested size in bytes, if a disk can have it. An unchecked size can overflow when it
    /// is added to or rounded up.
    ///
    /// - Throws: `ImageError` for more than `largestDiskSize`.
    public func checkedAsDiskSize() throws(ImageError) -> Int64 {
        guard self <= largestDiskSize else { throw .tooLarge("a disk of \(self) bytes") }
        return self
    }
}
