import DiskImage
import Foundation
import Testing

@testable import ImageStorage

/// A folder that is removed with the test.
final class Folder {
    let path: String

    init() throws {
        let template = FileManager.default.temporaryDirectory.path + "/swimg-test-\(UUID())"
        try FileManager.default.createDirectory(
            atPath: template, withIntermediateDirectories: true)
        path = template
    }

    deinit { try? FileManager.default.removeItem(atPath: path) }

    var names: [String] {
        get throws { try FileManager.default.contentsOfDirectory(atPath: path).sorted() }
    }

    func file(_ name: String, _ bytes: [UInt8]? = nil) throws -> String {
        let file = "\(path)/\(name)"
        if let bytes { try Data(bytes).write(to: URL(fileURLWithPath: file)) }
        return file
    }
}

func contents(_ path: String) throws -> [UInt8] {
    Array(try Data(contentsOf: URL(fileURLWithPath: path)))
}

@Suite struct FileStorageTests {
    let folder: Folder

    init() throws { folder = try Folder() }

    private func pattern(_ count: Int) -> [UInt8] {
        (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ $0 >> 8) }
    }

    private func read(
        _ storage: FileStorage, _ range: Range<Int64>
    ) async throws -> [UInt8] {
        var buffer = try IOBuffer(byteCount: range.count)
        var span = buffer.mutableBytes
        try await storage.read(into: &span, at: range.lowerBound)
        return buffer.bytes.withUnsafeBytes { Array($0) }
    }

    /// Written bytes are read back, aligned or not, through the page cache or directly.
    @Test(arguments: CacheMode.allCases)
    func readsAndWritesAtAnyOffset(mode: CacheMode) async throws {
        let path = try folder.file("disk", [])
        var expected = pattern(70_000)
        do {
            let storage = try FileStorage.openExistingTarget(HostPath(path), cacheMode: mode)
            try await storage.truncate(to: Int64(expected.count))
            let pieces = [
                0..<5, 5..<4096, 4096..<12288, 12288..<12289, 12289..<40_000, 40_000..<70_000,
            ]
            for piece in pieces.reversed() {
                let bytes = Array(expected[piece])
                let span = bytes.span.bytes
                try await storage.write(span, at: Int64(piece.lowerBound))
            }
            try await storage.zero(5000..<9000, mayUnmap: true)
            expected.replaceSubrange(5000..<9000, with: repeatElement(0, count: 4000))
            try await storage.zero(20_000..<60_000, mayUnmap: false)
            expected.replaceSubrange(20_000..<60_000, with: repeatElement(0, count: 40_000))
            try await storage.flush()
        }
        #expect(try contents(path) == expected)
        let source = try FileStorage.openSource(HostPath(path), cacheMode: mode)
        for range: Range<Int64> in [0..<70_000, 1..<2, 4095..<4097, 69_999..<70_000, 8192..<16384] {
            let bytes = try await read(source, range)
            #expect(bytes == Array(expected[Int(range.lowerBound)..<Int(range.upperBound)]))
        }
        await #expect(throws: ImageError.self) { _ = try await read(source, 69_999..<70_001) }
    }

    @Test func findsHoles() async throws {
        let path = try folder.file("sparse", [])
        do {
            let target = try FileStorage.openExistingTarget(HostPath(path), cacheMode: .unsafe)
            try await target.truncate(to: 1 << 20)
            let bytes = pattern(65536)
            let span = bytes.span.bytes
            try await target.write(span, at: 131_072)
        }
        let storage = try FileStorage.openSource(HostPath(path))
        var extents: [Extent] = []
        var offset: Int64 = 0
        while offset < storage.size {
            let extent = try await storage.extent(at: offset, limit: storage.size)
            extents.append(extent)
            offset = extent.range.upperBound
        }
        #expect(
            extents == [
                Extent(range: 0..<131_072, isHole: true),
                Extent(range: 131_072..<196_608, isHole: false),
                Extent(range: 196_608..<1 << 20, isHole: true),
            ])
        // From the middle, and cut at a limit.
        let part = try await storage.extent(at: 140_000, limit: 150_000)
        #expect(part == Extent(range: 140_000..<150_000, isHole: false))
    }

    @Test func refusesWhatIsNoDisk() throws {
        #expect(throws: ImageError.self) { try FileStorage.openSource(HostPath(folder.path)) }
        #expect(throws: ImageError.self) { try FileStorage.openSource("/dev/null") }
        #expect(throws: ImageError.self) {
            try FileStorage.openSource(HostPath(folder.file("none")))
        }
        let pipe = try folder.file("pipe")
        #expect(mkfifo(pipe, 0o600) == 0)
        #expect(throws: ImageError.self) { try FileStorage.openSource(HostPath(pipe)) }
    }

    /// A child that another thread has just forked holds a copy of the descriptor for a moment.
    @Test func locksEndWithTheStorage() throws {
        let path = try folder.file("disk", [1])
        var target: FileStorage? = try FileStorage.openExistingTarget(
            HostPath(path), cacheMode: .unsafe)
        let copy = dup(try #require(target?.descriptor))
        defer { close(copy) }
        #expect(throws: ImageError.self) { _ = try FileStorage.openSource(HostPath(path)) }
        target = nil
        _ = try FileStorage.openSource(HostPath(path))
    }

    @Test func locksKeepWritersAlone() throws {
        let path = try folder.file("disk", [1, 2, 3])
        let reader = try FileStorage.openSource(HostPath(path))
        let second = try FileStorage.openSource(HostPath(path))
        #expect(throws: ImageError.self) {
            try FileStorage.openExistingTarget(HostPath(path), cacheMode: .unsafe)
        }
        withExtendedLifetime((reader, second)) {}
        let other = try folder.file("other", [1, 2, 3])
        let writer = try FileStorage.openExistingTarget(HostPath(other), cacheMode: .unsafe)
        #expect(throws: ImageError.self) { try FileStorage.openSource(HostPath(other)) }
        #expect(throws: Never.self) {
            try FileStorage.openSource(HostPath(other), shareForced: true)
        }
        withExtendedLifetime(writer) {}
    }

    @Test func knowsWhatCannotFit() throws {
        let storage = try FileStorage.openExistingTarget(
            HostPath(folder.file("disk", [])), cacheMode: .unsafe)
        #expect(throws: Never.self) { try storage.requireSpace(1) }
        let error = #expect(throws: ImageError.self) { try storage.requireSpace(1 << 60) }
        #expect(error?.description.contains("No space left on device") == true)
    }
}
