import DiskImage
import ImageStorage
import Synchronization

/// An image whose metadata has been read in full and found sound, which a verb has to know before
/// it changes anything in place (docs/architecture.md, "Changing an image in place").
///
/// In such an image a refcount is never lower than the number of references, every place that is
/// named is valid, and a cluster with a refcount of one is named once. So a cluster that loses its
/// last reference is free, and a table with one reference can be written in place.
///
/// The cost is that of `check`: each L2 table and refcount block is read once, and each host
/// cluster in use takes two bytes of memory.
struct SoundImage: Sendable {
    let header: Qcow2Header
    let refcounts: RefcountReader
    /// Index of the first cluster behind the file and behind everything that a table or a refcount
    /// names.
    let firstFree: Int64
    let snapshots: [Qcow2Snapshot]
    /// Length of the list of snapshots in bytes.
    let snapshotTableSize: Int64

    /// Checks the image.
    ///
    /// - Parameter mendsSnapshots: see `Qcow2Checker`.
    /// - Throws: `ImageError` with a message of one line if the image has errors. Leaks are not
    ///   errors.
    init(_ storage: any Storage, mendsSnapshots: Bool = false) async throws {
        let first = Mutex<String?>(nil)
        let checker = try await Qcow2Checker(
            .examining(storage), repair: nil, mendsSnapshots: mendsSnapshots,
            onMessage: { text in first.withLock { $0 = $0 ?? text } })
        let result = try await checker.run()
        if let problem = checker.overlap(rebuilds: false) {
            throw ImageError.corrupt(storage.name, problem)
        }
        guard result.corruptions == 0, result.checkErrors == 0 else {
            let detail = first.withLock { $0 }.map { " (\($0))" } ?? ""
            throw ImageError.corrupt(
                storage.name, "the image has errors: repair it first (check -r all)\(detail)")
        }
        header = checker.header
        refcounts = checker.refcounts
        snapshots = checker.snapshots
        snapshotTableSize = Int64(checker.snapshotTableSize)
        // A device does not end with the image.
        firstFree = Int64(
            storage.traits.isDevice ? checker.lastUsedCluster + 1 : checker.counts.clusterCount)
    }

    /// Corrects the flags that say whether a refcount is one, after refcounts have been lowered.
    ///
    /// - Throws: `ImageError`.
    static func mendCopiedFlags(_ storage: any WritableStorage) async throws {
        let checker = try await Qcow2Checker(
            .damaged(storage), repair: .all, onMessage: { _ in })
        try await checker.readRefcountTable()
        try await checker.checkCopiedFlags()
        try await storage.flush()
    }
}
