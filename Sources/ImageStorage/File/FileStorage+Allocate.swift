import CLinux
import DiskImage
import Glibc

extension FileStorage {
    /// Reserves the blocks of a range within the file.
    ///
    /// - Parameter isNeeded: false where the range is written in any case: a file system that cannot
    ///   reserve does no harm then.
    func reserve(_ range: Range<Int64>, isNeeded: Bool) throws(ImageError) {
        let result = Syscall.retry {
            clinux_fallocate(
                descriptor, clinux_FALLOC_FL_KEEP_SIZE, range.lowerBound, Int64(range.count))
        }
        guard result == nil else { return }
        if errno == EOPNOTSUPP {
            guard isNeeded else { return }
            // The C library writes into each block where the kernel cannot reserve.
            let code = posix_fallocate(descriptor, off_t(range.lowerBound), off_t(range.count))
            guard code != 0 else { return }
            errno = code
        }
        throw Syscall.failure(name, "cannot preallocate \(range.count) bytes")
    }

    /// Asks a copy-on-write file system to write to the file in place. Only btrfs knows such a thing, and
    /// a refusal harms nobody.
    public func disableCopyOnWrite() { _ = clinux_set_no_cow(descriptor) }

    /// Sets the unit in which XFS allocates the file's blocks, in bytes.
    ///
    /// - Returns: what the file system said; nil if it did.
    public func setExtentSizeHint(_ bytes: Int64) -> String? {
        guard let size = UInt32(exactly: bytes),
            clinux_set_extent_size_hint(descriptor, size) == 0
        else { return String(cString: strerror(errno)) }
        return nil
    }
}
