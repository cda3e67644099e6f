import DiskImage
import Glibc

extension ImageError {
    /// The refusal of a size beyond `largestDiskSize`, in the system's words.
    public static func tooLarge(_ what: String, path: String? = nil) -> ImageError {
        ImageError(
            .system(errno: EFBIG), path: path, "\(what): \(String(cString: strerror(EFBIG)))")
    }
}

/// A size in bytes that was asked for, once it is known to be one that a disk can have. Before that
/// check neither a sum with it nor what it is rounded up to is certain to be a number.
///
/// - Throws: `ImageError` for more than `largestDiskSize`.
public func checkedDiskSize(_ bytes: Int64) throws(ImageError) -> Int64 {
    guard bytes <= largestDiskSize else { throw .tooLarge("a disk of \(bytes) bytes") }
    return bytes
}
