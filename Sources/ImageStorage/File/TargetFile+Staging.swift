import CLinux
import DiskImage
import Glibc

// How a file comes to be where nobody sees it yet.
extension TargetFile {
    typealias Staged = (storage: FileStorage, place: Place)

    /// Opens a new, empty file in the target's folder.
    ///
    /// - Parameter existing: a file whose owner, mode, ACL and extended attributes it must have.
    static func stage(
        _ path: String, named name: String, cacheMode: CacheMode, like existing: Int32?
    ) throws(ImageError) -> Staged {
        let folder = TargetPath.folder(of: path)
        let flags = O_RDWR | cacheMode.openFlags
        var place = Place.unnamed
        var descriptor = Syscall.retry {
            clinux_open(folder, flags | O_CLOEXEC | clinux_O_TMPFILE, 0o644)
        }
        // A file system without unnamed files, or no /proc to name them through.
        if descriptor == nil && [EOPNOTSUPP, EISDIR, ENOENT, EINVAL].contains(errno)
            || descriptor != nil && access("/proc/self/fd", X_OK) != 0
        {
            if let descriptor { close(descriptor) }
            let hidden = TargetPath.hiddenName(beside: path)
            descriptor = Syscall.retry {
                clinux_open(hidden, flags | O_CLOEXEC | O_CREAT | O_EXCL, 0o644)
            }
            place = .hidden(hidden)
        }
        guard let descriptor else {
            if cacheMode.isDirect && errno == EINVAL {
                throw ImageError(
                    .system(errno: EINVAL), path: name,
                    "cannot create: the file system does not support O_DIRECT")
            }
            throw Syscall.failure(name, "cannot create")
        }
        do {
            // The target's name, not the hidden one, is what errors should speak of.
            let storage = try FileStorage(
                adopting: descriptor, name: name, cacheMode: cacheMode, readsAsZero: true)
            if let existing { try copyAttributes(from: existing, to: descriptor, name) }
            return (storage, place)
        } catch {
            if case .hidden(let hidden) = place { unlink(hidden) }
            throw error
        }
    }

    private static func copyAttributes(
        from existing: Int32, to descriptor: Int32, _ name: String
    ) throws(ImageError) {
        let old = try Syscall.status(existing, name)
        let new = try Syscall.status(descriptor, name)
        if old.st_uid != new.st_uid || old.st_gid != new.st_gid {
            guard fchown(descriptor, old.st_uid, old.st_gid) == 0 else {
                throw Syscall.failure(name, "cannot keep the owner")
            }
        }
        guard fchmod(descriptor, old.st_mode & 0o7777) == 0 else {
            throw Syscall.failure(name, "cannot keep the mode")
        }
        // ACLs and security labels are extended attributes as well.
        for attribute in try attributeNames(of: existing, name) {
            let value = try bytes(name) { fgetxattr(existing, attribute, $0, $1) }
            guard fsetxattr(descriptor, attribute, value, value.count, 0) == 0 else {
                throw Syscall.failure(name, "cannot keep the attribute \(attribute)")
            }
        }
    }

    private static func attributeNames(
        of descriptor: Int32, _ name: String
    ) throws(ImageError) -> [String] {
        let list = try bytes(name) { buffer, count in
            flistxattr(descriptor, buffer?.assumingMemoryBound(to: CChar.self), count)
        }
        return list.split(separator: 0).map { String(decoding: $0, as: UTF8.self) }
    }

    /// Calls twice: for the length, then for the bytes. None where there are no attributes at all.
    private static func bytes(
        _ name: String, _ call: (UnsafeMutableRawPointer?, Int) -> Int
    ) throws(ImageError) -> [UInt8] {
        let length = call(nil, 0)
        if length == 0 || length < 0 && errno == ENOTSUP { return [] }
        guard length > 0 else { throw Syscall.failure(name, "cannot read its attributes") }
        var value = [UInt8](repeating: 0, count: length)
        let count = value.withUnsafeMutableBytes { call($0.baseAddress, length) }
        guard count >= 0 else { throw Syscall.failure(name, "cannot read its attributes") }
        value.removeLast(length - count)
        return value
    }
}

/// Names in the file system, before there is a file to ask.
enum TargetPath {
    static func folder(of path: String) -> String {
        guard let slash = path.lastIndex(of: "/") else { return "." }
        return slash == path.startIndex ? "/" : String(path[..<slash])
    }

    /// Hidden, recognisable and unused: the process and a random number.
    static func hiddenName(beside path: String) -> String {
        let file = path.split(separator: "/").last ?? "target"
        let random = String(UInt32.random(in: .min ... .max), radix: 36)
        // A file name has 255 bytes at most; a character has up to four.
        return "\(folder(of: path))/.\(file.prefix(50)).swimg-\(getpid())-\(random)"
    }

    /// Follows symbolic links to where a file is or, for a dangling link, would be.
    static func behindLinks(_ path: String) throws(ImageError) -> String {
        var current = path
        // As many as the kernel follows.
        for _ in 0..<40 {
            var buffer = [UInt8](repeating: 0, count: Int(PATH_MAX))
            let length = buffer.withUnsafeMutableBytes {
                clinux_readlink(current, $0.baseAddress, $0.count)
            }
            guard length > 0 else { return current }
            let next = String(decoding: buffer[..<length], as: UTF8.self)
            current = next.hasPrefix("/") ? next : folder(of: current) + "/" + next
        }
        throw Syscall.failure(path, "cannot create", errno: ELOOP)
    }

    /// Whether a new file may take the place of an existing one without anyone noticing.
    static func canBeReplaced(_ path: String, _ status: stat) -> Bool {
        status.st_mode & S_IFMT == S_IFREG && status.st_nlink == 1
            && clinux_is_mount_root(path) == 0
            && access(folder(of: path), W_OK | X_OK) == 0
            && !isKeptBySticky(folder(of: path), owner: status.st_uid)
    }

    /// In a sticky folder (/tmp) only the owner of a file or of the folder may replace it.
    private static func isKeptBySticky(_ folder: String, owner: uid_t) -> Bool {
        var status = stat()
        guard stat(folder, &status) == 0, status.st_mode & S_ISVTX != 0, geteuid() != 0 else {
            return false
        }
        return geteuid() != owner && geteuid() != status.st_uid
    }
}
