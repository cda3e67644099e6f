import CLinux
import DiskImage
import Glibc

/// The locks by which qemu's programs avoid using each other's images.
///
/// qemu locks single bytes of the file (open-file-description locks): byte 100 + p says "I use
/// permission p", byte 200 + p says "others may not use permission p". All locks are shared ones; a
/// program takes its own and then looks for the opposite ones of others.
/// Source: QEMU documentation, "Disk image file locking", and the bytes a running qemu-io holds.
enum ImageLock {
    private enum Permission: Int64, CaseIterable {
        case consistentRead = 0
        case write = 1
        case resize = 3

        var name: String {
            switch self {
            case .consistentRead: "consistent read"
            case .write: "write"
            case .resize: "resize"
            }
        }
    }

    private static let usedBase: Int64 = 100
    private static let unsharedBase: Int64 = 200

    /// Takes the locks of a reader or a writer.
    ///
    /// File systems without such locks are used without them, as in qemu (`locking=auto`).
    static func acquire(
        _ descriptor: Int32, _ path: String, forWriting: Bool
    ) throws(ImageError) {
        let used: [Permission] =
            forWriting ? [.consistentRead, .write, .resize] : [.consistentRead]
        let unshared: [Permission] = [.write, .resize]
        for offset in used.map({ usedBase + $0.rawValue })
            + unshared.map({ unsharedBase + $0.rawValue })
        {
            guard clinux_ofd_lock(descriptor, Int16(F_RDLCK), offset, 1) == 0 else { return }
        }
        for permission in used
        where clinux_ofd_is_locked(descriptor, unsharedBase + permission.rawValue, 1) == 1 {
            throw conflict(path, "Failed to get \"\(permission.name)\" lock")
        }
        for permission in unshared
        where clinux_ofd_is_locked(descriptor, usedBase + permission.rawValue, 1) == 1 {
            throw conflict(path, "Failed to get shared \"\(permission.name)\" lock")
        }
    }

    /// Drops the locks, which closing alone may not do: a child process that any thread of the
    /// program has just forked has the descriptor until it executes another program.
    static func release(_ descriptor: Int32) {
        _ = clinux_ofd_lock(descriptor, Int16(F_UNLCK), usedBase, 2 * (unsharedBase - usedBase))
    }

    private static func conflict(_ path: String, _ reason: String) -> ImageError {
        ImageError(
            .system(errno: EAGAIN), path: path, "\(reason): is another process using the image?"
        ).asQemu(
            reason,
            hint: "Is another process using the image [\(path.withoutControlCharacters)]?")
    }
}
