import CLinux
import DiskImage
import Glibc

// Files on XFS, btrfs and others can have blocks in common, each with its own view of them (reflinks):
// a copy that takes no time and no space. `man ioctl_ficlonerange`.
extension FileStorage {
    public var sharesBlocks: Bool { sharing.withLock { $0.isWorthTrying } }

    /// From now on everything has to be copied.
    private func stopSharing() { sharing.withLock { $0.isWorthTrying = false } }

    /// Stops sharing where the file system cannot share with any of these files, before a source is
    /// searched for holes in vain: they are devices, on another file system, or it has no reflinks.
    public func stopSharing(unlessWith sources: [any Storage]) {
        guard sharesBlocks else { return }
        if !sources.contains(where: { ($0 as? FileStorage).map(canShare) ?? false }) {
            stopSharing()
        }
    }

    /// Asks for no bytes from the end of the source on: that changes nothing, and yet the kernel
    /// looks at both files first.
    private func canShare(with source: FileStorage) -> Bool {
        guard !source.traits.isDevice else { return false }
        let status = Syscall.retry {
            clinux_clone_range(descriptor, 0, source.descriptor, UInt64(source.size), 0)
        }
        return status != nil || !Self.neverShared.contains(errno)
    }

    /// Another file system, or one that has no reflinks.
    private static let neverShared = [EXDEV, EOPNOTSUPP, ENOTTY, ENOSYS]

    public func share(_ location: HostLocation, at offset: Int64) -> Int64 {
        guard let source = location.holder as? FileStorage, !source.traits.isDevice,
            let blockSize = sharing.withLock({ $0.blockSize(of: descriptor) })
        else { return 0 }
        let start = location.range.lowerBound
        guard start % blockSize == 0, offset % blockSize == 0 else { return 0 }
        // Whole blocks, but for the last one of a file, and that only as the last one of the other.
        let length = Int64(location.range.count)
        let endsBoth = start + length == source.size && offset + length == size
        let shared = endsBoth ? length : length.roundedDown(to: blockSize)
        guard shared > 0 else { return 0 }
        let status = Syscall.retry {
            clinux_clone_range(
                descriptor, UInt64(offset), source.descriptor, UInt64(start), UInt64(shared))
        }
        if status != nil { return shared }
        // It will not be otherwise for the next range. A full disk and the like are left for the
        // copying to meet.
        if (Self.neverShared + [EPERM, EINVAL, ETXTBSY]).contains(errno) {
            stopSharing()
        }
        return 0
    }
}

/// What is known about sharing blocks with a file.
struct BlockSharing {
    var isWorthTrying: Bool
    private var knownBlockSize: Int64?

    init(isWorthTrying: Bool) { self.isWorthTrying = isWorthTrying }

    /// Of the file system, in bytes; nil where sharing is not worth trying.
    mutating func blockSize(of descriptor: Int32) -> Int64? {
        guard isWorthTrying else { return nil }
        if let knownBlockSize { return knownBlockSize }
        var space = statvfs()
        guard fstatvfs(descriptor, &space) == 0, space.f_bsize > 0 else {
            isWorthTrying = false
            return nil
        }
        knownBlockSize = Int64(space.f_bsize)
        return knownBlockSize
    }
}
