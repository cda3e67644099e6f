import DiskImage
import Foundation
import ImageConvert
import ImageStorage
import MemoryImages
import TestSupport
import Testing

@testable import ImageFormats

/// Images that are changed in place, as a crash at any moment leaves them: valid to qemu-img but
/// for leaks, with old or new content.
@Suite(.enabled(if: Qemu.isInstalled, "the judge is qemu-img")) struct CrashTests {
    /// Largest number of crashes of each kind that are played.
    private static let mostCrashes = 12

    static let options = [
        "cluster_size=4k", "cluster_size=512", "compat=0.10,cluster_size=4k",
        "extended_l2=on,cluster_size=16k", "refcount_bits=1,cluster_size=4k",
        "refcount_bits=64,cluster_size=1k", "lazy_refcounts=on,cluster_size=64k",
    ]
    private static let size = 1 << 20

    /// An image with all kinds of clusters; with a snapshot where the refcounts can count it.
    private func image(
        _ options: String, _ folder: TempFolder, hasSnapshot: Bool = true
    ) throws -> String {
        let path = folder.path("image")
        try Qemu.img("create", "-q", "-f", "qcow2", "-o", options, path, "\(Self.size)")
        try Qemu.io("qcow2", path, ["write -P 1 0 300k", "write -c -P 2 320k 64k"])
        if hasSnapshot, !options.contains("refcount_bits=1,") {
            try Qemu.img("snapshot", "-c", "old", path)
        }
        try Qemu.io(
            "qcow2", path,
            ["write -P 3 64k 100k", "write -z 200k 64k", "write -P 4 700k 40k", "discard 0 16k"])
        return path
    }

    private func storage(_ path: String) throws -> MemoryStorage {
        MemoryStorage(try Array(contents(path)), traits: StorageTraits())
    }

    private func disk(_ bytes: [UInt8]) async throws -> [UInt8] {
        let source = try await Qcow2Source(MemoryStorage(bytes, traits: StorageTraits()))
        var buffer = try IOBuffer(byteCount: Int(source.virtualSize))
        var span = buffer.mutableBytes
        try await LayeredSource(layers: [source]).read(into: &span, at: 0)
        return buffer.bytes.withUnsafeBytes { Array($0) }
    }

    // MARK: The changes

    @Test(arguments: options, [false, true])
    func writingIntoAnImage(_ options: String, _ compresses: Bool) async throws {
        let folder = try TempFolder()
        let storage = try storage(try image(options, folder))
        let before = storage.bytes
        let source = SketchSource("AB00-Cd-EEEE00--ooooFg-H0000IIII", blockSize: 32768)
        var settings = TargetSettings(minSparse: 4096)
        settings.compress = compresses
        let target = try await Qcow2InPlaceTarget(
            storage, settings, leavesBacking: false, tablesLimit: 2048)
        try await Pipeline(baseWorkers: 3, writesInOrder: false)
            .copy(from: source, extents: source, to: target)
        #expect(try await disk(storage.bytes) == source.bytes)
        try await judge(storage, before, in: folder)
    }

    @Test(arguments: options)
    func takingASnapshot(_ options: String) async throws {
        let folder = try TempFolder()
        let storage = try storage(try image(options, folder))
        let before = storage.bytes
        do {
            try await Qcow2ImageSnapshots().create(Array("new".utf8), in: storage)
            #expect(!options.contains("refcount_bits=1,"))
        } catch let error as ImageError {
            #expect(options.contains("refcount_bits=1,"), "\(error)")
            #expect(storage.bytes == before)
        }
        #expect(try await disk(storage.bytes) == disk(before))
        try await judge(storage, before, in: folder)
    }

    @Test(arguments: options.filter { !$0.contains("refcount_bits=1,") })
    func applyingASnapshot(_ options: String) async throws {
        let folder = try TempFolder()
        let path = try image(options, folder)
        let storage = try storage(path)
        let before = storage.bytes
        try await Qcow2ImageSnapshots().apply(.either(Array("old".utf8)), in: storage)
        try Qemu.img("snapshot", "-a", "old", path)
        #expect(try await disk(storage.bytes) == disk(Array(contents(path))))
        try await judge(storage, before, in: folder)
    }

    @Test(arguments: options.filter { !$0.contains("refcount_bits=1,") })
    func deletingASnapshot(_ options: String) async throws {
        let folder = try TempFolder()
        let storage = try storage(try image(options, folder))
        let before = storage.bytes
        try await Qcow2ImageSnapshots().delete(.either(Array("old".utf8)), in: storage)
        #expect(try await disk(storage.bytes) == disk(before))
        try await judge(storage, before, in: folder)
    }

    @Test(arguments: options.filter { !$0.contains("0.10") })
    func changingBitmaps(_ options: String) async throws {
        let folder = try TempFolder()
        let path = try image(options, folder)
        try Qemu.img("bitmap", "--add", "-g", "512", path, "one")
        try Qemu.img("bitmap", "--add", "--disable", path, "two")
        try Qemu.io("qcow2", path, ["write -P 9 40k 300k"])
        let storage = try storage(path)
        let before = storage.bytes
        let one = Array("one".utf8)
        for change in [
            BitmapChange(name: Array("two".utf8), actions: [.merge(one), .enable]),
            BitmapChange(name: Array("three".utf8), actions: [.add(granularity: nil)]),
            BitmapChange(name: one, actions: [.remove]),
        ] {
            try await Qcow2ImageBitmaps().change(storage, [change])
        }
        #expect(try await disk(storage.bytes) == disk(before))
        try await judge(storage, before, in: folder)
    }

    // MARK: The judge

    /// Plays crashes: of the program, after each change, and of the machine, with any of the
    /// changes since the last flush lost.
    private func judge(
        _ storage: MemoryStorage, _ before: [UInt8], in folder: TempFolder
    ) async throws {
        let changes = storage.changes
        let (old, new) = (try await disk(before), try await disk(storage.bytes))
        try expectSound(storage.bytes, in: folder, leaks: false, "at the end")
        var random = SplitMix64(seed: 1)
        let step = max(1, changes.count / Self.mostCrashes)
        for count in stride(from: 0, through: changes.count, by: step) {
            let flushed =
                changes[..<count].lastIndex { if case .flush = $0 { true } else { false } } ?? 0
            for losesChanges in [false, true] {
                var bytes = before
                for (number, change) in changes[..<count].enumerated()
                where number < flushed || !losesChanges || random.once(in: 2) {
                    change.apply(to: &bytes)
                }
                let story = "after \(count) of \(changes.count) changes, loses \(losesChanges)"
                try expectSound(bytes, in: folder, leaks: true, story)
                let found = try await disk(bytes)
                let wrong = firstMixedSector(of: found, old: old, new: new)
                #expect(wrong == nil, "\(story)")
            }
        }
    }

    private func expectSound(
        _ bytes: [UInt8], in folder: TempFolder, leaks: Bool, _ story: String
    ) throws {
        let outcome = try run(
            "qemu-img", ["check", "-f", "qcow2", folder.write("crashed", bytes)])
        #expect(outcome.status == 0 || leaks && outcome.status == 3, "\(story): \(outcome)")
    }
}
