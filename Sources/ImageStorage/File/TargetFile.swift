import CLinux
import DiskImage
import Glibc
import Synchronization

/// The file or device that a conversion writes, which shows up under its name whole or not at all.
///
/// A new file is written without a name (O_TMPFILE) or under a hidden one beside the target, and
/// takes the target's name in `commit`. An existing file is replaced so, too, with owner, mode,
/// ACL, extended attributes and inode flags carried over. Written in place is what cannot be
/// replaced unnoticed (a device, several hard links, a mount point, a folder we may not write,
/// attributes we may not set), what is named by a descriptor, and an empty file, which has nothing
/// to lose: a program that made it or holds it open sees the new content.
public final class TargetFile: Sendable {
    /// What to write to.
    public let storage: FileStorage
    /// Nothing stands under the target's name until `commit`.
    public var isStaged: Bool {
        switch place {
        case .unnamed, .hidden: true
        case .inPlace, .new: false
        }
    }

    enum Place: Equatable {
        /// Open, in the target's folder, without a name.
        case unnamed
        /// Under this hidden name beside the target.
        case hidden([UInt8])
        /// Where it was found.
        case inPlace
        /// Made under the target's name, because nothing else was allowed.
        case new
    }

    private let place: Place
    /// Where the target's name stands; nil for what is written in place and keeps its name.
    private let folder: TargetFolder?
    /// What stood under the name, kept open for its lock: a running machine may use it.
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

    /// Prepares to create a target, or to replace what stands under its name.
    ///
    /// - Parameters:
    ///   - protected: files that must not be overwritten: the source and all below it.
    ///   - keepsOld: what stands under the name is read until `commit`, so writing in place is no way.
    public static func create(
        _ path: HostPath, cacheMode: CacheMode, protecting protected: Set<FileIdentity> = [],
        keepsOld: Bool = false
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
        if keepsOld {
            throw .unsupported(
                path.description,
                "cannot keep the old content beside the new one: it can only be written in place")
        }
        if existing.traits.isDevice { return TargetFile(storage: existing, place: .inPlace) }
        return TargetFile(
            storage: try emptied(existing), place: .inPlace, existing: existing)
    }

    /// Opens an existing target to be written as it stands (`-n`).
    public static func openExisting(
        _ path: HostPath, cacheMode: CacheMode, protecting protected: Set<FileIdentity> = []
    ) throws(ImageError) -> TargetFile {
        // Before it is opened: the source's lock would only tell that it is in use.
        if let identity = FileIdentity(path: path), protected.contains(identity) {
            throw isSource(path)
        }
        let storage = try FileStorage.openExistingTarget(path, cacheMode: cacheMode)
        return TargetFile(storage: storage, place: .inPlace)
    }

    private static func isSource(_ path: HostPath) -> ImageError {
        ImageError(
            .invalid, path: path.description, "is the source, or a file that the source reads")
    }

    /// A staged file that can take the place of an existing one; nil where that has to be written
    /// as it stands.
    private static func replacement(
        for existing: FileStorage, _ path: HostPath, _ cacheMode: CacheMode
    ) throws(ImageError) -> TargetFile? {
        let status = try Syscall.status(existing.descriptor, existing.name)
        guard status.st_mode & S_IFMT == S_IFREG, status.st_size > 0,
            let folder = try? TargetFolder.behindLinks(path), !folder.isProcessFolder,
            // The file that the kernel opened, and none that has come to stand there since.
            folder.identity(of: folder.fileName) == existing.identity,
            folder.canReplace(status),
            let staged = try? stage(in: folder, named: existing.name, cacheMode)
        else { return nil }
        let replacement = TargetFile(
            storage: staged.storage, place: staged.place, folder: folder, existing: existing)
        do {
            try replacement.storage.takeAttributes(of: existing)
            return replacement
        } catch {
            return nil
        }
    }

    private static func createNew(
        _ path: HostPath, _ cacheMode: CacheMode
    ) throws(ImageError) -> TargetFile {
        let folder = try TargetFolder.behindLinks(path)
        guard !folder.fileName.isEmpty else {
            throw Syscall.failure(path.description, "cannot create", errno: EISDIR)
        }
        let staged = try stage(in: folder, named: path.description, cacheMode)
        return TargetFile(storage: staged.storage, place: staged.place, folder: folder)
    }

    /// Starts an existing file anew, in place.
    private static func emptied(_ existing: FileStorage) throws(ImageError) -> FileStorage {
        guard ftruncate(existing.descriptor, 0) == 0 else {
            throw Syscall.failure(existing.name, "cannot set the size to 0 bytes")
        }
        // A duplicate shares the lock, as long as nobody drops it; a second `open` would meet the lock of the first.
        let copy = fcntl(existing.descriptor, F_DUPFD_CLOEXEC, 0)
        guard copy >= 0 else { throw Syscall.failure(existing.name, "cannot open") }
        return try FileStorage(
            adopting: copy, name: existing.name, cacheMode: existing.cacheMode, readsAsZero: true)
    }

    /// Gives the written file its name. Flushes first where the cache mode asks for it.
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
            throw Syscall.failure(storage.name, "cannot flush its folder")
        }
    }

    private var notPutInPlace: ImageError {
        Syscall.failure(storage.name, "cannot put the finished file in place")
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

    /// Gives an unnamed file its name. `linkat` does not replace, so an existing file needs a
    /// detour.
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

    /// Opens a new, empty file in the target's folder: without a name, else under a hidden one,
    /// else under the target's own.
    private static func stage(
        in folder: TargetFolder, named name: String, _ cacheMode: CacheMode
    ) throws(ImageError) -> (storage: FileStorage, place: Place) {
        let flags = O_RDWR | cacheMode.openFlags
        var place = Place.unnamed
        var descriptor = folder.openUnnamed(flags)
        // A file system without unnamed files, or no /proc to name them through.
        if descriptor == nil && [EOPNOTSUPP, EISDIR, ENOENT, EINVAL].contains(errno)
            || descriptor != nil && access("/proc/self/fd", X_OK) != 0
        {
            if let descriptor { close(descriptor) }
            errno = EPERM
            // A hidden name that could not be changed afterwards would stay.
            if folder.isChangeable, let hidden = folder.createHidden(flags) {
                descriptor = hidden.descriptor
                place = .hidden(hidden.name)
            } else {
                descriptor = nil
            }
        }
        // A profile can allow a program nothing but the target's own name (AppArmor).
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
            // The target's name, not the hidden one, is what errors should speak of.
            let storage = try FileStorage(
                adopting: descriptor, name: name, cacheMode: cacheMode, readsAsZero: true)
            return (storage, place)
        } catch {
            if case .hidden(let hidden) = place { folder.remove(hidden) }
            throw error
        }
    }
}
