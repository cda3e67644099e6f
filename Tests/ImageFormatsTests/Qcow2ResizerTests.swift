import DiskImage
import ImageStorage
import MemoryImages
import Testing

@testable import ImageFormats

/// Images that change their size in memory, on a storage that fails at any operation.
@Suite struct Qcow2ResizerTests {
    /// 100 KiB in clusters of 512 bytes: 4 L2 tables, one of them with clusters of zeros only.
    private static let guest: [UInt8] = (0..<200).flatMap { cluster in
        [UInt8](repeating: 64..<128 ~= cluster ? 0 : UInt8(cluster + 1), count: 512)
    }

    private func image() async throws -> MemoryStorage {
        var options = Qcow2Options()
        options.clusterSize = 512
        return try await Qcow2WriteTests().write(Self.guest, options, minSparse: 512)
    }

    private func resize(
        _ storage: MemoryStorage, to size: Int64, _ preallocation: Preallocation = .off
    ) async throws {
        let header = try await Qcow2Header.read(from: storage)
        var resizer = try await Qcow2Resizer(storage: storage, header: header, backing: nil)
        try await resizer.resize(to: size, preallocation: preallocation)
    }

    private func expected(_ size: Int) -> [UInt8] {
        Array(Self.guest.prefix(size))
            + [UInt8](repeating: 0, count: max(0, size - Self.guest.count))
    }

    /// The disk, after a look at the whole image.
    private func checkedDisk(
        _ storage: MemoryStorage, allowsLeaks: Bool = false
    ) async throws -> [UInt8] {
        let copy = MemoryStorage(storage.bytes)
        let result = try await Qcow2ImageChecker().check(copy) { _ in }
        #expect(result.corruptions == 0 && result.checkErrors == 0)
        if !allowsLeaks { #expect(result.leaks == 0) }
        return try await readAll(Qcow2Source(copy))
    }

    /// Sizes within a cluster, at the end of a table, in a new L1 table.
    @Test(arguments: [512, 33_280, 32_768, 102_400, 102_912, 131_072, 5_000_192])
    func newSizes(_ size: Int) async throws {
        let storage = try await image()
        try await resize(storage, to: Int64(size))
        #expect(try await checkedDisk(storage) == expected(size))
    }

    @Test func whatWasCutOffDoesNotComeBack() async throws {
        let storage = try await image()
        try await resize(storage, to: 1024)
        try await resize(storage, to: Int64(Self.guest.count))
        let disk = try await checkedDisk(storage)
        #expect(disk.prefix(1024) == Self.guest.prefix(1024))
        #expect(disk.dropFirst(1024).allSatisfy { $0 == 0 })
    }

    /// The storage fails at each operation in turn. The disk has its old size or its new one, and
    /// what the old one held; before the switch the file is as it was, to the byte.
    @Test(arguments: [1024, 204_800], [Preallocation.off, .metadata])
    func failuresLeaveAValidImage(_ size: Int, _ preallocation: Preallocation) async throws {
        guard size > Self.guest.count || preallocation == .off else { return }
        var outcomes: Set<Int> = []
        var failures = 0
        let before = try await image().bytes
        for number in 0..<400 {
            let storage = MemoryStorage(before)
            storage.fail(at: number)
            do {
                try await resize(storage, to: Int64(size), preallocation)
                #expect(try await checkedDisk(storage) == expected(size))
                break
            } catch {
                failures += 1
                let disk = try await checkedDisk(storage, allowsLeaks: true)
                outcomes.insert(disk.count)
                #expect(disk == expected(disk.count), "operation \(number)")
                if disk.count == Self.guest.count, size > Self.guest.count {
                    #expect(storage.bytes == before, "operation \(number)")
                }
            }
        }
        #expect(failures > 10 && failures < 400)
        #expect(outcomes.isSubset(of: [Self.guest.count, size]))
        // A disk that shrinks has its new size first.
        if size < Self.guest.count { #expect(outcomes.contains(size)) }
    }
}
