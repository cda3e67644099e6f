import DiskImage
import Testing

@testable import HTTPStorage

/// The body that a server without ranges sends, fed by hand.
@Suite struct HTTPBodyTests {
    private static let file = (0..<100).map { UInt8($0) }

    private let body: HTTPBody

    init() throws {
        body = HTTPBody(name: "file", head: Array(Self.file[..<10]), loop: try HTTPLoop(most: 1))
    }

    private func read(_ count: Int) -> Task<[UInt8], any Error> {
        Task { [body] in
            var buffer = try IOBuffer(byteCount: count)
            var bytes = buffer.mutableBytes
            let found = try await body.read(into: &bytes)
            return buffer.bytes.withUnsafeBytes { Array($0[..<found]) }
        }
    }

    /// Offers bytes until they are taken.
    private func feed(_ range: Range<Int>) async {
        while !Self.file[range].withUnsafeBytes({ body.take($0) }) { await Task.yield() }
    }

    @Test func beginsWithTheHead() async throws {
        #expect(try await read(6).value == Array(Self.file[..<6]))
        let next = read(20)
        await feed(10..<50)
        #expect(try await next.value == Array(Self.file[6..<26]))
        // These have come already.
        #expect(try await read(24).value == Array(Self.file[26..<50]))
        let last = read(10)
        await feed(50..<55)
        await feed(55..<60)
        #expect(try await last.value == Array(Self.file[50..<60]))
    }

    @Test func makesTheServerWait() async throws {
        #expect(!Self.file[10..<17].withUnsafeBytes { body.take($0) })
        #expect(try await read(10).value == Array(Self.file[..<10]))
        #expect(!Self.file[10..<17].withUnsafeBytes { body.take($0) })
    }

    @Test func endsForACancelledReader() async throws {
        let reading = read(20)
        await feed(10..<12)
        reading.cancel()
        await #expect(throws: CancellationError.self) { try await reading.value }
    }
}
