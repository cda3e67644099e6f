import Synchronization
import Testing

@testable import HTTPStorage

/// The body that a server without ranges sends, fed by hand.
@Suite struct HTTPStreamTests {
    private static let file = (0..<100).map { UInt8($0) }

    private func stream() throws -> HTTPStream {
        HTTPStream(name: "file", head: Array(Self.file[..<10]), loop: try HTTPLoop(most: 1))
    }

    private func read(_ stream: HTTPStream, _ range: Range<Int64>) -> Task<[UInt8], any Error> {
        Task {
            let memory = UnsafeMutableRawBufferPointer.allocate(
                byteCount: range.count, alignment: 1)
            defer { memory.deallocate() }
            try await stream.read(range, into: memory)
            return Array(memory)
        }
    }

    /// Feeds bytes until a read is complete.
    private func feed(
        _ stream: HTTPStream, from start: inout Int, until task: Task<[UInt8], any Error>
    ) async throws -> [UInt8] {
        let isOver = Flag()
        let waiting = Task {
            defer { isOver.set() }
            return try await task.value
        }
        while !isOver.isSet {
            let end = min(start + 7, Self.file.count)
            if start < end,
                Self.file[start..<end].withUnsafeBytes({ stream.take($0) })
            {
                start = end
            } else {
                await Task.yield()
            }
        }
        return try await waiting.value
    }

    @Test func servesReadsInAnyOrder() async throws {
        let stream = try stream()
        var position = 10
        let late = read(stream, 40..<60)
        let early = read(stream, 5..<40)
        #expect(try await feed(stream, from: &position, until: early) == Array(Self.file[5..<40]))
        #expect(try await feed(stream, from: &position, until: late) == Array(Self.file[40..<60]))
        #expect(position < 70)
    }

    /// Bytes that no read asks for are passed over, and can still be read for a while.
    @Test func passesOver() async throws {
        let stream = try stream()
        var position = 10
        let far = read(stream, 80..<90)
        #expect(try await feed(stream, from: &position, until: far) == Array(Self.file[80..<90]))
        let behind = read(stream, 20..<30)
        #expect(try await behind.value == Array(Self.file[20..<30]))
    }

    /// A read waits for a later place while the body still moves, and then stands still.
    @Test(.timeLimit(.minutes(1))) func passesOverLater() async throws {
        let stream = try stream()
        var position = 10
        let far = read(stream, 80..<90)
        try await Task.sleep(for: .milliseconds(100))
        let near = read(stream, 10..<20)
        #expect(try await feed(stream, from: &position, until: near) == Array(Self.file[10..<20]))
        #expect(try await feed(stream, from: &position, until: far) == Array(Self.file[80..<90]))
    }

    @Test func waitsForARead() throws {
        let stream = try stream()
        #expect(!Self.file[10..<17].withUnsafeBytes { stream.take($0) })
    }
}

private final class Flag: Sendable {
    private let value = Mutex(false)

    var isSet: Bool { value.withLock { $0 } }

    func set() { value.withLock { $0 = true } }
}
