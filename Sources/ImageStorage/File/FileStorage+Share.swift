import CLinux
import DiskImage
import Glibc

// Files on XFS, btrfs and other file systems can share blocks until one of them changes (reflinks):
// such a copy takes no time and no space. `man ioctl_ficlonerange`.
extension FileStorage {
    public var sharesBlocks: Bool { sharing.withLock { $0.isWorthTrying } }

    /// Turns sharing off: everything is copied from now on.
    private func stopSharing() { sharing.withLock { $0.isWorthTrying = false } }

    /// Stops sharing if it cannot work with any source (devices, another file system, no reflinks),
    /// before a source is searched for holes in vain.
    public func stopSharing(unlessWith sources: [any Storage]) {
        guard sharesBlocks else { return }
        if !sources.contains(where: { ($0 as? FileStorage).map(canShare) ?? false }) {
            stopSharing()
        }
    }

    /// Whether blocks of a source can be shared. Asks for zero bytes at the end of the source,
    /// which changes nothing, although the kernel checks both files.
    private func canShare(with source: FileStorage) -> Bool {
        guard !source.traits.isDevice else { return false }
        let status = Syscall.retry {
            clinux_clone_range(descriptor, 0, source.descriptor, UInt64(source.size), 0)
        }
        return status != nil || !Self.neverShared.contains(errno)
    }

    /// The errors for another file system, and for one without reflinks.
    private static let neverShared = [EXDEV, EOPNOTSUPP, ENOTTY, ENOSYS]

    public func share(
        _ range: Range<Int64>, of holder: any BlockHolder, at offset: Int64
    ) -> Int64 {
        guard let source = holder as? FileStorage, !source.traits.isDevice,
            let blockSize = sharing.withLock({ $0.blockSize(of: descriptor) })
        else { return 0 }
        let start = range.lowerBound
        guard start % blockSize == 0, offset % blockSize == 0 else { return 0 }
        // Only whole blocks can be shared, except at the end of both files.
        let length = Int64(range.count)
        let endsBoth = start + length == source.size && offset + length == size
        let shared = endsBoth ? length : length.roundedDown(to: blockSize)
        guard shared > 0 else { return 0 }
        let status = Syscall.retry {
            clinux_clone_range(
                descriptor, UInt64(offset), source.descriptor, UInt64(start), UInt64(shared))
        }
        if status != nil { return shared }
        // These errors would come again for every range. Any other, such as a full disk, is left
        // for the copy to report.
        if (Self.neverShared + [EPERM, EINVAL, ETXTBSY]).contains(errno) {
            stopSharing()
        }
        return 0
    }
}

/// The state of block sharing for a file.
struct BlockSharing {
    var isWorthTrying: Bool
    private var knownBlockSize: Int64?

    init(isWorthTrying: Bool) { self.isWorthTrying = isWorthTrying }

    /// Block size of the file system in bytes; nil if sharing is not worth trying.
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
