import CLinux
import DiskImage
import Glibc
import Synchronization

/// The file or device that a conversion writes. It shows up under its name complete or not at all.
///
/// A new file is written without a name (O_TMPFILE) or under a hidden one beside the target, and
/// takes the target's name in `commit`. An existing file is replaced in this way, too; owner, mode,
/// ACL, extended attributes and inode flags are carried over. A file is written in place if it
/// cannot be replaced unnoticed (a device, several hard links, a mount point, a folder we may not
/// write, attributes we may not set), if a descriptor names it, or if it is empty: it has nothing
/// to lose, and a program that made it or holds it open sees the new content.
public final class TargetFile: Sendable {
    /// The storage to write to.
    public let storage: FileStorage
    /// Whether the content takes the target's name only in `commit`.
    public var isStaged: Bool {
        switch place {
        case .unnamed, .hidden: true
        case .inPlace, .new: false
        }
    }

    enum Place: Equatable {
        /// Open in the target's folder, without a name.
        case unnamed
        /// Under this hidden name beside the target.
        case hidden([UInt8])
        /// Under the name where it was found.
        case inPlace
        /// Made under the target's name, because nothing else was allowed.
        case new
    }

    private let place: Place
    /// The folder of the target's name; nil if the file is written in place and keeps its name.
    private let folder: TargetFolder?
    /// The file found under the name, kept open for its lock: a running machine may use it.
    private let existing: FileStorage?
    private let isSettled = Atomic<Bool>(false)

    private init(
        storage: FileStorage, place: Place, folder: TargetFolder? = nil,
        existing: FileStorage? = nil
    ) {
        self.storage = storage
        self.place = place
        self.folder = folder
        self.existing = existing
    }

    deinit { abandon() }

    /// Prepares to create a target, or to replace the file that has its name.
    ///
    /// - Parameter protected: files that must not be overwritten: the source and the files that it
    ///   reads.
    public static func create(
        _ path: HostPath, cacheMode: CacheMode, protecting protected: Set<FileIdentity> = []
    ) throws(ImageError) -> TargetFile {
        // The kernel follows links first: it may refuse one that another user left in a shared
        // folder (`fs.protected_symlinks`), and then the program must not follow it either.
        var status = stat()
        guard path.withCString({ stat($0, &status) }) == 0 else {
            guard errno == ENOENT else {
                throw Syscall.failure(path.description, "cannot create")
            }
            return try createNew(path, cacheMode)
        }
        if protected.contains(FileIdentity(status)) { throw isSource(path) }
        let existing = try FileStorage.openExistingTarget(
            path, cacheMode: cacheMode, mayCreate: true)
        if protected.contains(existing.identity) { throw isSource(path) }
        if let replacement = try replacement(for: existing, path, cacheMode) { return replacement }
        if existing.traits.isDevice { return TargetFile(storage: existing, place: .inPlace) }
        return TargetFile(
            storage: try emptied(existing), place: .inPlace, existing: existing)
    }

    /// Opens an existing target to be written as it stands (`-n`).
    public static func openExisting(
        _ path: HostPath, cacheMode: CacheMode, protecting protected: Set<FileIdentity> = []
    ) throws(ImageError) -> TargetFile {
        // Before it is opened: the source's lock would only tell that the file is in use.
        if let identity = FileIdentity(path: path), protected.contains(identity) {
            throw isSource(path)
        }
        let storage = try FileStorage.openExistingTarget(path, cacheMode: cacheMode)
        return TargetFile(storage: storage, place: .inPlace)
    }

    private static func isSource(_ path: HostPath) -> ImageError {
        ImageError(
            .invalid, path: path.description,
            "cannot be the target: it is the source, or a file that the source reads")
    }

    /// A staged file that can replace an existing one; nil if that has to be written in place.
    private static func replacement(
        for existing: FileStorage, _ path: HostPath, _ cacheMode: CacheMode
    ) throws(ImageError) -> TargetFile? {
        let status = try Syscall.status(existing.descriptor, existing.name)
        guard status.st_mode & S_IFMT == S_IFREG, status.st_size > 0,
            let folder = try? TargetFolder.behindLinks(path), !folder.isProcessFolder,
            // The kernel must have opened this file, and not another that has since taken the name.
            folder.identity(of: folder.fileName) == existing.identity,
            folder.canReplace(status),
            let staged = try? stage(in: folder, named: existing.name, cacheMode, existing),
            (try? staged.storage.takeAttributes(of: existing)) != nil
        else { return nil }
        return staged
    }

    private static func createNew(
        _ path: HostPath, _ cacheMode: CacheMode
    ) throws(ImageError) -> TargetFile {
        let folder = try TargetFolder.behindLinks(path)
        guard !folder.fileName.isEmpty else {
            throw Syscall.failure(path.description, "cannot create", errno: EISDIR)
        }
        return try stage(in: folder, named: path.description, cacheMode)
    }

    /// Empties an existing file that is to be written in place.
    private static func emptied(_ existing: FileStorage) throws(ImageError) -> FileStorage {
        guard ftruncate(existing.descriptor, 0) == 0 else {
            throw Syscall.failure(existing.name, "cannot truncate it")
        }
        // A duplicate shares the lock as long as it is not dropped; a second `open` would conflict
        // with the lock of the first.
        let copy = fcntl(existing.descriptor, F_DUPFD_CLOEXEC, 0)
        guard copy >= 0 else {
            throw Syscall.failure(existing.name, "cannot duplicate its descriptor")
        }
        return try FileStorage(
            adopting: copy, name: existing.name, cacheMode: existing.cacheMode, readsAsZero: true)
    }

    /// Gives the written file its name. Flushes first if the cache mode asks for it.
    public func commit() async throws {
        try await storage.flush()
        try storage.reportLateErrors()
        switch place {
        case .inPlace, .new: break
        case .hidden(let hidden):
            guard folder?.putInPlace(hidden) == true else { throw notPutInPlace }
        case .unnamed:
            guard let folder, link(in: folder) else { throw notPutInPlace }
        }
        isSettled.store(true, ordering: .relaxed)
        if storage.cacheMode.flushes, let folder, !folder.flush() {
            throw Syscall.failure(
                storage.name, "is whole, but its folder cannot be flushed to disk")
        }
    }

    private var notPutInPlace: ImageError {
        Syscall.failure(storage.name, "cannot give the finished image its name")
    }

    /// Removes what was written. A file written in place is emptied, so that it does not look
    /// finished; a device and an existing image under `-n` stay as they are.
    public func abandon() {
        guard !isSettled.exchange(true, ordering: .relaxed) else { return }
        switch place {
        case .unnamed: break
        case .hidden(let hidden): folder?.remove(hidden)
        case .inPlace:
            if storage.traits.readsAsZero, !storage.traits.isDevice {
                _ = ftruncate(storage.descriptor, 0)
            }
        case .new:
            _ = ftruncate(storage.descriptor, 0)
            if let folder, folder.identity(of: folder.fileName) == storage.identity {
                folder.remove(folder.fileName)
            }
        }
    }

    /// Gives an unnamed file its name. `linkat` cannot replace an existing file, so that takes a
    /// hidden name and a rename.
    private func link(in folder: TargetFolder) -> Bool {
        if folder.link(storage.descriptor, as: folder.fileName) { return true }
        guard errno == EEXIST else { return false }
        let hidden = folder.newHiddenName()
        guard folder.link(storage.descriptor, as: hidden) else { return false }
        if folder.putInPlace(hidden) { return true }
        let code = errno
        folder.remove(hidden)
        errno = code
        return false
    }

    // MARK: Staging

    /// Opens a new, empty file in the target's folder: without a name, else under a hidden name,
    /// else under the target's name.
    ///
    /// - Parameter existing: the file that it is to replace.
    private static func stage(
        in folder: TargetFolder, named name: String, _ cacheMode: CacheMode,
        _ existing: FileStorage? = nil
    ) throws(ImageError) -> TargetFile {
        let flags = O_RDWR | cacheMode.openFlags
        var place = Place.unnamed
        var descriptor = folder.openUnnamed(flags)
        // The file system has no unnamed files, or there is no /proc to name them through.
        if descriptor == nil && [EOPNOTSUPP, EISDIR, ENOENT, EINVAL].contains(errno)
            || descriptor != nil && access("/proc/self/fd", X_OK) != 0
        {
            if let descriptor { close(descriptor) }
            errno = EPERM
            // A hidden name that cannot be changed afterwards would stay.
            if folder.isChangeable, let hidden = folder.createHidden(flags) {
                descriptor = hidden.descriptor
                place = .hidden(hidden.name)
            } else {
                descriptor = nil
            }
        }
        // An AppArmor profile can allow a program nothing but the target's own name.
        if descriptor == nil, errno == EACCES || errno == EPERM {
            descriptor = folder.create(folder.fileName, flags)
            place = .new
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
            // Errors should show the target's name, not the hidden one.
            let storage = try FileStorage(
                adopting: descriptor, name: name, cacheMode: cacheMode, readsAsZero: true)
            return TargetFile(storage: storage, place: place, folder: folder, existing: existing)
        } catch {
            if case .hidden(let hidden) = place { folder.remove(hidden) }
            throw error
        }
    }
}
