import DiskImage
import ImageStorage
import MemoryImages
import Testing

@testable import ImageFormats

/// Images in memory that are amended, emptied or get another backing file, on a storage that fails
/// at any operation: at one, or at all from one on, as when the program is killed there.
@Suite struct Qcow2AmenderTests {
    private static let backing = BackingName("below", format: "raw")

    /// 50 KiB in clusters of 512 bytes: 2 L2 tables, with data and with clusters of zeros that
    /// hide a backing file.
    private static let guest: [UInt8] = (0..<100).flatMap { cluster in
        [UInt8](repeating: cluster % 3 == 0 ? 0 : UInt8(cluster + 1), count: 512)
    }

    private func image(isBacked: Bool) async throws -> MemoryStorage {
        var options = Qcow2Options()
        options.clusterSize = 512
        if isBacked {
            options.backing = Qcow2Options.Backing(
                file: Self.backing.name, format: "raw", virtualSize: Int64(Self.guest.count))
        }
        return try await Qcow2WriteTests().write(Self.guest, options, minSparse: 512)
    }

    private func amend(_ storage: MemoryStorage, _ options: String) async throws {
        let typed = try TypedOptions(
            amending: CreationOptions([Array(options.utf8)]), .qcow2)
        try await Qcow2ImageAmender().amend(
            storage, typed,
            key: ImageKey(), force: false,
            openBacking: { _ in ZeroSource(virtualSize: Int64(Self.guest.count)) },
            openData: { _ in nil })
    }

    /// The disk without its backing file, after a look at the whole image.
    private func checkedDisk(
        _ storage: MemoryStorage, allowsLeaks: Bool = false, _ what: String = ""
    ) async throws -> [UInt8] {
        let copy = MemoryStorage(storage.bytes)
        let result = try await Qcow2ImageChecker().check(copy) { _ in }
        #expect(result.corruptions == 0 && result.checkErrors == 0, "\(what)")
        if !allowsLeaks { #expect(result.leaks == 0, "\(what)") }
        return try await readAll(Qcow2Source(copy))
    }

    /// Fails at each write, flush or change of the size in turn.
    ///
    /// - Parameter judge: looks at the image after a failure.
    private func everyFailure(
        of image: MemoryStorage, _ change: (MemoryStorage) async throws -> Void,
        _ judge: (_ image: MemoryStorage, _ what: String) async throws -> Void
    ) async throws {
        let trial = MemoryStorage(image.bytes)
        try await change(trial)
        let operations = trial.operations
        let writes = operations.indices.filter { number in
            if case .read = operations[number] { false } else { true }
        }
        #expect(writes.count > 5)
        for number in writes {
            for count in [1, 1_000_000] {
                let storage = MemoryStorage(image.bytes)
                storage.fail(at: number, count: count)
                // Calls that give back space may fail without harm.
                try? await change(storage)
                try await judge(storage, "operation \(number), \(count)")
            }
        }
    }

    @Test(
        arguments: [
            "compat=0.10", "refcount_bits=1", "refcount_bits=8", "refcount_bits=64",
            "lazy_refcounts=on,refcount_bits=2", "compat=0.10,size=200k", "size=25600",
        ], [false, true])
    func amended(_ options: String, isBacked: Bool) async throws {
        let storage = try await image(isBacked: isBacked)
        try await amend(storage, options)
        let disk = try await checkedDisk(storage)
        let kept = min(disk.count, Self.guest.count)
        #expect(disk.prefix(kept) == Self.guest.prefix(kept))
        #expect(disk.dropFirst(kept).allSatisfy { $0 == 0 })
        let header = try await Qcow2Header.read(from: storage)
        #expect(header.backing == (isBacked ? Self.backing : nil))
        #expect(header.version == (options.contains("0.10") ? 2 : 3))
        try await amend(storage, "compat=1.1")
        #expect(try await checkedDisk(storage) == disk)
        // Every cluster of zeros hides the backing file still.
        let mappings = try await all(Qcow2Source(storage))
        let isShowing = mappings.contains { $0.content == .unallocated }
        #expect(isShowing == (!isBacked || options.contains("200k")))
    }

    private func all(_ source: Qcow2Source) async throws -> [Mapping] {
        var walk = MappingWalk(source)
        var found: [Mapping] = []
        var offset: Int64 = 0
        while offset < source.virtualSize {
            found.append(try await walk.mapping(at: offset, limit: source.virtualSize))
            offset = found[found.count - 1].range.upperBound
        }
        return found
    }

    @Test(arguments: ["compat=0.10", "refcount_bits=64", "refcount_bits=8,lazy_refcounts=on"])
    func failuresLeaveTheDisk(_ options: String) async throws {
        let image = try await image(isBacked: true)
        try await everyFailure(
            of: image, { try await amend($0, options) },
            { storage, what in
                let disk = try await checkedDisk(storage, allowsLeaks: true, what)
                #expect(disk == Self.guest, "\(what)")
            })
    }

    /// New refcounts that cannot be written leave the file as it was, to the byte.
    @Test func anOldFileStays() async throws {
        let image = try await image(isBacked: false)
        let before = image.bytes
        var switched = 0
        try await everyFailure(
            of: image, { try await amend($0, "refcount_bits=64") },
            { storage, what in
                let header = try await Qcow2Header.read(from: MemoryStorage(storage.bytes))
                if header.refcountBits == 64 {
                    switched += 1
                } else if !what.contains("1000000") {
                    #expect(storage.bytes == before, "\(what)")
                }
            })
        #expect(switched > 0)
    }

    @Test func countsThatAreTooLargeAreRefused() async throws {
        let image = try await image(isBacked: false)
        try await Qcow2ImageSnapshots().create(Array("s".utf8), in: image)
        let before = image.bytes
        await #expect {
            try await amend(image, "refcount_bits=1")
        } throws: {
            ($0 as? ImageError)?.message.contains("has a refcount of 2") ?? false
        }
        #expect(image.bytes == before)
        try await amend(image, "refcount_bits=2")
        #expect(try await checkedDisk(image) == Self.guest)
    }

    /// Tables that a snapshot shares are changed for both.
    @Test(arguments: [false, true])
    func snapshotsAreDowngraded(isBacked: Bool) async throws {
        let image = try await image(isBacked: isBacked)
        try await Qcow2ImageSnapshots().create(Array("s".utf8), in: image)
        try await amend(image, "compat=0.10")
        #expect(try await checkedDisk(image) == Self.guest)
        let snapshot = try await Qcow2Source(image, snapshot: .either(Array("s".utf8)))
        #expect(try await readAll(snapshot) == Self.guest)
    }
}

extension Qcow2AmenderTests {
    @Test(arguments: [false, true])
    func emptied(hasSnapshot: Bool) async throws {
        let image = try await image(isBacked: true)
        if hasSnapshot { try await Qcow2ImageSnapshots().create(Array("s".utf8), in: image) }
        try await Qcow2OverlayEditor().prepareToEmpty(image, data: nil)()
        #expect(try await all(Qcow2Source(image)).allSatisfy { $0.content == .unallocated })
        _ = try await checkedDisk(image)
        guard hasSnapshot else { return }
        let snapshot = try await Qcow2Source(image, snapshot: .either(Array("s".utf8)))
        #expect(try await readAll(snapshot) == Self.guest)
    }

    /// Each cluster is the old one or left to the backing file.
    @Test func failuresLeaveOldClusters() async throws {
        let image = try await image(isBacked: true)
        let clusters = Self.guest.count / 512
        try await everyFailure(
            of: image, { try await Qcow2OverlayEditor().prepareToEmpty($0, data: nil)() },
            { storage, what in
                let disk = try await checkedDisk(storage, allowsLeaks: true, what)
                let isOld = (0..<clusters).allSatisfy { cluster in
                    let range = cluster * 512..<(cluster + 1) * 512
                    return disk[range] == Self.guest[range] || disk[range].allSatisfy { $0 == 0 }
                }
                #expect(isOld, "\(what)")
            })
    }

    @Test(arguments: [nil, BackingName("other", format: "qcow2")])
    func renamed(_ backing: BackingName?) async throws {
        let image = try await image(isBacked: true)
        var names: Set<String> = []
        let before = try await Qcow2Header.read(from: image)
        for number in 0..<20 {
            let storage = MemoryStorage(image.bytes)
            storage.fail(at: number)
            let isDone: Bool
            do {
                try await Qcow2OverlayEditor().prepareToRebase(storage, on: backing)()
                isDone = true
            } catch { isDone = false }
            let copy = MemoryStorage(storage.bytes)
            var header = try await Qcow2Header.read(from: copy)
            names.insert(header.backingFile?.description ?? "")
            if isDone {
                #expect(header.backing == backing)
            } else {
                #expect(header == before, "operation \(number)")
            }
            header.backingFile = before.backingFile
            header.backingFormat = before.backingFormat
            #expect(header == before)
            if isDone { break }
        }
        #expect(names == ["below", backing?.name.description ?? ""])
    }
}
