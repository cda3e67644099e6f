import DiskImage
import Synchronization
import Testing

@testable import ImageStorage

/// Bytes that tell their offset, in 8-byte words.
private final class CountingStream: ByteStream {
    private let size: Int64
    private let failsAt: Int64
    private let position = Mutex<Int64>(0)

    init(_ size: Int64, failsAt: Int64 = .max) {
        self.size = size
        self.failsAt = failsAt
    }

    static func byte(_ offset: Int64) -> UInt8 {
        UInt8(truncatingIfNeeded: (offset / 8) >> (8 * (offset % 8)))
    }

    func read(into buffer: inout MutableRawSpan) async throws -> Int {
        let start = position.withLock { $0 }
        let count = Int(min(Int64(buffer.byteCount), size - start))
        guard start + Int64(count) <= failsAt else { throw ImageError.invalid("broken") }
        var part = buffer.slice(0..<count)
        part.withUnsafeMutableBytes { bytes in
            for index in bytes.indices { bytes[index] = Self.byte(start + Int64(index)) }
        }
        position.withLock { $0 = start + Int64(count) }
        return count
    }

    var progress: StreamProgress? {
        StreamProgress(done: position.withLock { $0 }, total: size)
    }
}

@Suite struct StreamStorageTests {
    private static let mib: Int64 = 1 << 20

    private func storage(
        _ length: Int64, size: Int64? = nil, failsAt: Int64 = .max
    ) -> StreamStorage {
        StreamStorage(
            CountingStream(length, failsAt: failsAt), name: "stream", size: size, isRemote: false,
            advice: "do something else")
    }

    private func isRight(_ storage: StreamStorage, _ range: Range<Int64>) async throws -> Bool {
        var buffer = try IOBuffer(byteCount: range.count)
        var bytes = buffer.mutableBytes
        try await storage.read(into: &bytes, at: range.lowerBound)
        return buffer.bytes.withUnsafeBytes { bytes in
            bytes.indices.allSatisfy {
                bytes[$0] == CountingStream.byte(range.lowerBound + Int64($0))
            }
        }
    }

    @Test func readsNeighboursInAnyOrder() async throws {
        let storage = storage(5 * Self.mib + 10, size: 5 * Self.mib + 10)
        #expect(try await isRight(storage, 3 * Self.mib - 5..<3 * Self.mib + 5))
        #expect(try await isRight(storage, 0..<100))
        #expect(try await isRight(storage, Self.mib + 1..<5 * Self.mib + 10))
        await #expect(throws: ImageError.self) {
            try await isRight(storage, 5 * Self.mib..<5 * Self.mib + 11)
        }
    }

    /// A read far behind the stream's position is an error, and never brings other bytes.
    @Test func refusesToGoBackFar() async throws {
        let reach = StreamStorage.reach
        let storage = storage(3 * reach, size: 3 * reach)
        #expect(try await isRight(storage, reach - 8..<reach))
        #expect(try await isRight(storage, 0..<8))
        #expect(try await isRight(storage, 2 * reach - 8..<2 * reach))
        #expect(try await isRight(storage, reach..<reach + 8))
        let error = await #expect(throws: ImageError.self) {
            try await isRight(storage, 0..<8)
        }
        #expect(error?.message.contains("one pass: do something else") == true)
    }

    @Test func findsTheEnd() async throws {
        let length = 2 * Self.mib + 512
        let storage = storage(length)
        #expect(storage.size > length && storage.traits.isOpenEnded)
        let first = try await storage.extent(at: 100, limit: storage.size)
        #expect(first == Extent(range: 100..<Self.mib, isHole: false))
        #expect(storage.size > length)
        #expect(try await storage.extent(at: length - 1, limit: storage.size).range.count == 1)
        #expect(storage.size == length)
        #expect(try await storage.extent(at: length, limit: length + 1).range.isEmpty)
        #expect(try await isRight(storage, length - 600..<length))
    }

    /// An end at the edge of a block shows only when one asks for more.
    @Test func findsAnEndAtABlock() async throws {
        let storage = storage(Self.mib)
        #expect(try await storage.extent(at: 0, limit: storage.size).range.count == Int(Self.mib))
        #expect(try await storage.extent(at: Self.mib, limit: storage.size).range.isEmpty)
        #expect(storage.size == Self.mib)
    }

    @Test func readsToTheEnd() async throws {
        let right = storage(3 * Self.mib, size: 3 * Self.mib)
        #expect(try await isRight(right, 0..<8))
        try await right.finishReading()
        let short = storage(3 * Self.mib - 1, size: 3 * Self.mib)
        await #expect(throws: ImageError.self) { try await short.finishReading() }
        let long = storage(3 * Self.mib + 1, size: 3 * Self.mib)
        await #expect(throws: ImageError.self) { try await long.finishReading() }
        let broken = storage(3 * Self.mib, failsAt: 2 * Self.mib)
        #expect(try await isRight(broken, 0..<8))
        for _ in 0..<2 {
            await #expect(throws: ImageError.self) { try await broken.finishReading() }
        }
    }
}
