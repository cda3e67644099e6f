import CLinux
import DiskImage
import Glibc
import Synchronization

/// The file or device that a conversion writes, which shows up under its name whole or not at all.
///
/// A new file is written without a name (O_TMPFILE) or under a hidden one beside the target, and
/// takes the target's name in `commit`. An existing file is replaced so, too, with owner, mode, ACL and
/// extended attributes carried over. Where that cannot be done (a device, several hard links, a mount
/// point, a folder we may not write, attributes we may not set) it is written in place.
public final class TargetFile: Sendable {
    /// What to write to.
    public let storage: FileStorage
    /// Nothing stands under the target's name until `commit`.
    public var isStaged: Bool { place != .inPlace }

    enum Place: Equatable {
        /// Open, in the target's folder, without a name.
        case unnamed
        /// Under this hidden name beside the target.
        case hidden(String)
        case inPlace
    }

    private let place: Place
    /// Where the file will be: the path behind all symbolic links.
    private let path: String
    /// What stood under the name, kept open for its lock: a running machine may use it.
    private let existing: FileStorage?
    private let isSettled = Atomic<Bool>(false)

    init(storage: FileStorage, place: Place, path: String, existing: FileStorage?) {
        self.storage = storage
        self.place = place
        self.path = path
        self.existing = existing
    }

    deinit { abandon() }

    /// Prepares to create a target, or to replace what stands under its name.
    ///
    /// - Parameters:
    ///   - protected: files that must not be overwritten: the source and all below it.
    ///   - keepsOld: what stands under the name is read until `commit`, so writing in place is no way.
    public static func create(
        _ givenPath: String, cacheMode: CacheMode, protecting protected: Set<FileIdentity> = [],
        keepsOld: Bool = false
    ) throws(ImageError) -> TargetFile {
        let path = try TargetPath.behindLinks(givenPath)
        var status = stat()
        guard stat(path, &status) == 0 else {
            guard errno == ENOENT else { throw Syscall.failure(givenPath, "cannot create") }
            let staged = try stage(path, named: givenPath, cacheMode: cacheMode, like: nil)
            return TargetFile(
                storage: staged.storage, place: staged.place, path: path, existing: nil)
        }
        if protected.contains(FileIdentity(status)) {
            throw isSource(givenPath)
        }
        let existing = try FileStorage.openExistingTarget(path, cacheMode: cacheMode)
        if TargetPath.canBeReplaced(path, status),
            let staged = try? stage(
                path, named: givenPath, cacheMode: cacheMode, like: existing.descriptor)
        {
            return TargetFile(
                storage: staged.storage, place: staged.place, path: path, existing: existing)
        }
        if keepsOld {
            throw .unsupported(
                givenPath,
                "cannot keep the old content beside the new one: it can only be written in place")
        }
        if existing.traits.isDevice {
            return TargetFile(storage: existing, place: .inPlace, path: path, existing: nil)
        }
        return try emptied(existing, path: path, named: givenPath)
    }

    /// Opens an existing target to be written as it stands (`-n`).
    public static func openExisting(
        _ path: String, cacheMode: CacheMode, protecting protected: Set<FileIdentity> = []
    ) throws(ImageError) -> TargetFile {
        // Before it is opened: the source's lock would only tell that it is in use.
        if let identity = FileIdentity(path: path), protected.contains(identity) {
            throw isSource(path)
        }
        let storage = try FileStorage.openExistingTarget(path, cacheMode: cacheMode)
        return TargetFile(storage: storage, place: .inPlace, path: path, existing: nil)
    }

    private static func isSource(_ path: String) -> ImageError {
        ImageError(.invalid, path: path, "is the source, or a file that the source reads")
    }

    /// Starts an existing file anew, in place.
    private static func emptied(
        _ existing: FileStorage, path: String, named name: String
    ) throws(ImageError) -> TargetFile {
        guard ftruncate(existing.descriptor, 0) == 0 else {
            throw Syscall.failure(name, "cannot empty it")
        }
        // A duplicate shares the lock, as long as nobody drops it; a second `open` would meet the lock of the first.
        let copy = fcntl(existing.descriptor, F_DUPFD_CLOEXEC, 0)
        guard copy >= 0 else { throw Syscall.failure(name, "cannot open") }
        let storage = try FileStorage(
            adopting: copy, name: name, cacheMode: existing.cacheMode, readsAsZero: true)
        return TargetFile(storage: storage, place: .inPlace, path: path, existing: existing)
    }

    /// Gives the written file its name. Flushes first where the cache mode asks for it.
    public func commit() async throws {
        try await storage.flush()
        try storage.reportLateErrors()
        switch place {
        case .inPlace: break
        case .hidden(let hidden): try rename(hidden)
        case .unnamed: try link()
        }
        isSettled.store(true, ordering: .relaxed)
        if isStaged, storage.cacheMode.flushes { try flushFolder() }
    }

    /// Removes what was written. A file written in place is emptied, so that it does not look
    /// finished; a device and an existing image under `-n` stay as they are.
    public func abandon() {
        guard !isSettled.exchange(true, ordering: .relaxed) else { return }
        switch place {
        case .unnamed: break
        case .hidden(let hidden): unlink(hidden)
        case .inPlace:
            if storage.traits.readsAsZero, !storage.traits.isDevice {
                _ = ftruncate(storage.descriptor, 0)
            }
        }
    }

    private func rename(_ hidden: String) throws(ImageError) {
        guard Glibc.rename(hidden, path) == 0 else {
            throw Syscall.failure(storage.name, "cannot put the finished file in place")
        }
    }

    /// Gives an unnamed file its name. `linkat` does not replace, so an existing file needs a detour.
    private func link() throws(ImageError) {
        if linkUnnamed(path) { return }
        guard errno == EEXIST else {
            throw Syscall.failure(storage.name, "cannot put the finished file in place")
        }
        let hidden = TargetPath.hiddenName(beside: path)
        guard linkUnnamed(hidden) else {
            throw Syscall.failure(storage.name, "cannot put the finished file in place")
        }
        do { try rename(hidden) } catch {
            unlink(hidden)
            throw error
        }
    }

    private func linkUnnamed(_ name: String) -> Bool {
        linkat(
            AT_FDCWD, "/proc/self/fd/\(storage.descriptor)", AT_FDCWD, name, AT_SYMLINK_FOLLOW) == 0
    }

    private func flushFolder() throws(ImageError) {
        let folder = try Syscall.open(TargetPath.folder(of: path), flags: O_RDONLY | O_DIRECTORY)
        defer { close(folder) }
        // Some file systems cannot sync a folder and say so; there is nothing better to be had there.
        guard fsync(folder) == 0 || errno == EINVAL || errno == ENOTSUP else {
            throw Syscall.failure(storage.name, "cannot flush its folder")
        }
    }
}
