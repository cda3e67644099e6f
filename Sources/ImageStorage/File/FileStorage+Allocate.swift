import CLinux
import DiskImage
import Glibc

extension FileStorage {
    public func allocate(_ range: Range<Int64>, _ mode: Preallocation) throws(ImageError) {
        guard !traits.isDevice else {
            throw .unsupported(name, "Unsupported preallocation mode '\(mode.rawValue)'")
        }
        guard !range.isEmpty else { return }
        let result = Syscall.retry {
            clinux_fallocate(
                descriptor, clinux_FALLOC_FL_KEEP_SIZE, range.lowerBound, Int64(range.count))
        }
        guard result == nil else { return }
        if errno == EOPNOTSUPP {
            // A range that is to be full is written in any case, so the file system need not be
            // able to reserve it.
            guard mode == .falloc else { return }
            // posix_fallocate writes into each block if the kernel cannot reserve.
            let code = posix_fallocate(descriptor, off_t(range.lowerBound), off_t(range.count))
            guard code != 0 else { return }
            errno = code
        }
        throw Syscall.failure(name, "cannot preallocate \(range.count) bytes")
    }

    public func apply(_ attributes: FileAttributes) -> String? {
        guard !traits.isDevice else { return nil }
        // Only btrfs has this flag.
        if attributes.noCopyOnWrite { _ = clinux_set_no_cow(descriptor) }
        guard let hint = attributes.extentSizeHint, hint > 0 else { return nil }
        // The unit in which XFS allocates the file's blocks.
        if let size = UInt32(exactly: hint), clinux_set_extent_size_hint(descriptor, size) == 0 {
            return nil
        }
        return "Failed to set extent size hint: \(String(cString: strerror(errno)))"
    }
}
