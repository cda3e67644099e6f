import CLinux
import DiskImage
import Glibc

/// The folder of a target, and the target's name in it.
///
/// The folder is held open and names are looked up from there, so a link that is changed on the way
/// to the folder leads nowhere else.
final class TargetFolder: Sendable {
    private let descriptor: Int32
    /// The file's name in the folder.
    let fileName: [UInt8]
    /// Whether the folder's links lead to open files (`/dev/fd/3`): the path that such a link shows
    /// leads to another file, or to none.
    let isProcessFolder: Bool

    private init?(_ path: HostPath) {
        let folder = path.folder.withCString { folder in
            Syscall.retry { open(folder, clinux_O_PATH | O_DIRECTORY | O_CLOEXEC) }
        }
        guard let folder else { return nil }
        descriptor = folder
        fileName = path.fileName
        isProcessFolder = clinux_is_process_folder(descriptor) != 0
    }

    deinit { close(descriptor) }

    /// Follows symbolic links to where a file is or, for a dangling link, would be.
    ///
    /// A link in /proc is not followed: it has no path that would lead to the linked file.
    /// - Throws: `ImageError` with the path as it was given.
    static func behindLinks(_ path: HostPath) throws(ImageError) -> TargetFolder {
        var current = path
        // The kernel follows at most 40 links, too.
        for _ in 0..<40 {
            guard let folder = TargetFolder(current) else {
                throw Syscall.failure(path.description, "cannot create")
            }
            guard !folder.isProcessFolder, let next = folder.link else { return folder }
            current = current.resolving(HostPath(bytes: next))
        }
        throw Syscall.failure(path.description, "cannot create", errno: ELOOP)
    }

    /// The path in the symbolic link that has the name; nil if there is none.
    private var link: [UInt8]? {
        var buffer = [CChar](repeating: 0, count: Int(PATH_MAX))
        let length = fileName.withCString { readlinkat(descriptor, $0, &buffer, buffer.count) }
        return length > 0 ? buffer[..<length].map { UInt8(bitPattern: $0) } : nil
    }

    /// Opens a new file without a name in the folder.
    func openUnnamed(_ flags: Int32) -> Int32? {
        Syscall.retry {
            openat(descriptor, ".", flags | O_CLOEXEC | clinux_O_TMPFILE, 0o644)
        }
    }

    /// Makes a file; one of that name must not exist.
    func create(_ name: [UInt8], _ flags: Int32) -> Int32? {
        name.withCString { name in
            Syscall.retry {
                openat(descriptor, name, flags | O_CLOEXEC | O_CREAT | O_EXCL, 0o644)
            }
        }
    }

    /// Gives an open, unnamed file a name in the folder, which must be free.
    func link(_ file: Int32, as name: [UInt8]) -> Bool {
        name.withCString {
            linkat(AT_FDCWD, "/proc/self/fd/\(file)", descriptor, $0, AT_SYMLINK_FOLLOW) == 0
        }
    }

    /// Gives the target's name to another file of the folder.
    func putInPlace(_ name: [UInt8]) -> Bool {
        name.withCString { name in
            fileName.withCString { renameat(descriptor, name, descriptor, $0) == 0 }
        }
    }

    func remove(_ name: [UInt8]) {
        _ = name.withCString { unlinkat(descriptor, $0, 0) }
    }

    /// The identity of the folder itself.
    var identity: FileIdentity? {
        (try? Syscall.status(descriptor, "")).map { FileIdentity($0) }
    }

    /// The identity of the file that has a name in the folder; nil if there is none.
    func identity(of name: [UInt8]) -> FileIdentity? {
        var status = stat()
        let found = name.withCString {
            fstatat(descriptor, $0, &status, AT_SYMLINK_NOFOLLOW)
        }
        return found == 0 ? FileIdentity(status) : nil
    }

    /// Whether names in the folder can be changed and removed.
    var isChangeable: Bool { clinux_is_append_only(descriptor) == 0 }

    /// Whether a new file can replace an existing one unnoticed.
    ///
    /// - Parameter status: status of the existing file.
    func canReplace(_ status: stat) -> Bool {
        status.st_mode & S_IFMT == S_IFREG && status.st_nlink == 1
            && isChangeable
            && fileName.withCString { clinux_is_mount_root(descriptor, $0) } == 0
            && faccessat(descriptor, ".", W_OK | X_OK, 0) == 0
            && !isKeptBySticky(owner: status.st_uid)
    }

    /// Whether a sticky folder (/tmp) blocks us: only the file's or folder's owner may replace it.
    private func isKeptBySticky(owner: uid_t) -> Bool {
        var status = stat()
        guard fstatat(descriptor, ".", &status, 0) == 0, status.st_mode & S_ISVTX != 0,
            geteuid() != 0
        else { return false }
        return geteuid() != owner && geteuid() != status.st_uid
    }

    /// Puts the folder's names on stable storage.
    ///
    /// - Returns: false with `errno` set if that may have failed.
    func flush() -> Bool {
        let folder = openat(descriptor, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        // An AppArmor profile that shows a program only its target has no rule for flushing.
        guard folder >= 0 else { return errno == EACCES }
        defer { close(folder) }
        // Some file systems cannot sync a folder and say so; nothing better is available there.
        return fsync(folder) == 0 || errno == EINVAL || errno == ENOTSUP
    }

    // MARK: Hidden names

    private static let hiddenMark = Array(".swimg-".utf8)
    /// Length in bytes of the part of the target's name that a hidden name repeats: file names have
    /// at most 255 bytes, and less on some file systems.
    private static let longestStem = 100

    /// The prefix of all hidden names of this target.
    private var hiddenPrefix: [UInt8] {
        var stem = fileName.prefix(Self.longestStem)
        // Some file systems take only UTF-8: the name is cut between two characters.
        while stem.count < fileName.count, !stem.isEmpty,
            fileName[stem.count] & 0xc0 == 0x80
        {
            stem.removeLast()
        }
        return [UInt8(ascii: ".")] + stem + Self.hiddenMark
    }

    /// A hidden name that is recognisable and unused: it has the process id and a random number.
    func newHiddenName() -> [UInt8] {
        let random = String(UInt32.random(in: .min ... .max), radix: 36)
        return hiddenPrefix + Array("\(getpid())-\(random)".utf8)
    }

    /// Makes a file under a hidden name, and removes the files that killed conversions to this
    /// target have left.
    func createHidden(_ flags: Int32) -> (descriptor: Int32, name: [UInt8])? {
        removeAbandoned()
        while true {
            let name = newHiddenName()
            guard let file = create(name, flags) else { return nil }
            if Self.mark(file) != .takenByOther, isStill(file, name) { return (file, name) }
            // Another conversion took it for abandoned before it was marked.
            close(file)
            remove(name)
        }
    }

    private enum Mark { case own, takenByOther, impossible }

    /// Marks a file as being written by a living process, with a lock that ends with the process.
    private static func mark(_ file: Int32) -> Mark {
        if clinux_ofd_lock(file, Int16(F_WRLCK), 0, 1) == 0 { return .own }
        return errno == EAGAIN || errno == EACCES ? .takenByOther : .impossible
    }

    private func isStill(_ file: Int32, _ name: [UInt8]) -> Bool {
        var status = stat()
        return fstat(file, &status) == 0 && identity(of: name) == FileIdentity(status)
    }

    private func removeAbandoned() {
        let prefix = hiddenPrefix
        for name in names where name.starts(with: prefix) {
            let file = name.withCString {
                openat(descriptor, $0, O_RDWR | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC)
            }
            guard file >= 0 else { continue }
            defer { close(file) }
            // Without locks, nothing tells the files of living processes from abandoned ones.
            if Self.mark(file) == .own, isStill(file, name) { remove(name) }
        }
    }

    private var names: [[UInt8]] {
        let folder = openat(descriptor, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard folder >= 0, let stream = fdopendir(folder) else {
            if folder >= 0 { close(folder) }
            return []
        }
        defer { closedir(stream) }
        var names: [[UInt8]] = []
        while let entry = readdir(stream) {
            withUnsafeBytes(of: entry.pointee.d_name) { names.append(Array($0.prefix { $0 != 0 })) }
        }
        return names
    }
}
