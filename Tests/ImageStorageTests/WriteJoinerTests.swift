import CLinux
import DiskImage
import Glibc
import Testing

@testable import ImageStorage

@Suite struct WriteJoinerTests {
    private static func piece(_ range: Range<Int>) -> PendingWrite {
        PendingWrite(
            offset: Int64(range.lowerBound),
            bytes: UnsafeRawBufferPointer(
                start: UnsafeRawPointer(bitPattern: 4096), count: range.count))
    }

    private static func waiters<Waiter>(_ queue: inout WriteQueue<Waiter>) -> [Waiter]? {
        queue.next()?.waiters
    }

    private static func starts<Waiter>(_ queue: inout WriteQueue<Waiter>) -> Bool {
        queue.start()
    }

    @Test func firstCallerWritesTheOthersWait() {
        var queue = WriteQueue<String>()
        #expect(Self.starts(&queue))
        #expect(!Self.starts(&queue))
        #expect(queue.wait(Self.piece(10..<20), "b") == false)
        #expect(queue.wait(Self.piece(40..<50), "d") == false)
        #expect(queue.wait(Self.piece(0..<10), "a") == false)
        #expect(queue.wait(Self.piece(20..<25), "c") == false)
        let first = queue.next()
        #expect(first?.waiters == ["a", "b", "c"])
        #expect(first?.pieces.map(\.offset) == [0, 10, 20])
        #expect(Self.waiters(&queue) == ["d"])
        #expect(Self.waiters(&queue) == nil)
        #expect(Self.starts(&queue))
    }

    @Test func whoWaitsWithoutAWriterIsTheWriter() {
        var queue = WriteQueue<String>()
        #expect(queue.wait(Self.piece(0..<10), "a") == true)
        #expect(Self.waiters(&queue) == ["a"])
        #expect(Self.waiters(&queue) == nil)
    }

    @Test func batchesAreBounded() {
        var queue = WriteQueue<Int>()
        #expect(Self.starts(&queue))
        let size = 3 << 19
        for number in 0..<3 {
            #expect(queue.wait(Self.piece(number * size..<(number + 1) * size), number) == false)
        }
        // Each is larger than a batch may be, and still has to be written.
        #expect(Self.waiters(&queue) == [0])
        #expect(Self.waiters(&queue) == [1])
        #expect(Self.waiters(&queue) == [2])
        #expect(Self.waiters(&queue) == nil)
    }

    /// 64 tasks, each writing every 64th block: nothing is lost, mixed up or written twice.
    @Test func joinsManyWriters() async throws {
        let blockSize = 5000
        let descriptor = try Syscall.open("/tmp", flags: O_RDWR | clinux_O_TMPFILE, mode: 0o600)
        defer { close(descriptor) }
        let joiner = WriteJoiner(descriptor: descriptor, name: "joined")
        try await withTaskExecutorPreference(IOExecutor.shared) {
            try await withThrowingTaskGroup(of: Void.self) { group in
                for worker in 0..<64 {
                    group.addTask {
                        for block in stride(from: worker, to: 6400, by: 64) {
                            let bytes = UnsafeMutableRawBufferPointer.allocate(
                                byteCount: blockSize, alignment: 8)
                            defer { bytes.deallocate() }
                            bytes.initializeMemory(as: UInt8.self, repeating: UInt8(block % 251))
                            try await joiner.write(
                                UnsafeRawBufferPointer(bytes), at: Int64(block * blockSize))
                        }
                    }
                }
                for try await _ in group {}
            }
        }
        var found = [UInt8](repeating: 0, count: 6400 * blockSize + 1)
        let count = try found.withUnsafeMutableBytes {
            try Syscall.read(descriptor, "joined", into: $0, at: 0)
        }
        #expect(count == 6400 * blockSize)
        let wrong = (0..<6400).first { block in
            found[block * blockSize..<(block + 1) * blockSize].contains { $0 != UInt8(block % 251) }
        }
        #expect(wrong == nil)
    }

    /// Everybody whose bytes were not written is told.
    @Test func errorReachesAll() async throws {
        let descriptor = try Syscall.open("/dev/full", flags: O_WRONLY)
        defer { close(descriptor) }
        let joiner = WriteJoiner(descriptor: descriptor, name: "full")
        let failures = await withTaskGroup(of: Bool.self) { group in
            for worker in 0..<32 {
                group.addTask {
                    let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: 8, alignment: 8)
                    defer { bytes.deallocate() }
                    bytes.initializeMemory(as: UInt8.self, repeating: 1)
                    do {
                        try await joiner.write(UnsafeRawBufferPointer(bytes), at: Int64(worker * 8))
                        return false
                    } catch {
                        return (error as? ImageError)?.kind == .system(errno: ENOSPC)
                    }
                }
            }
            return await group.reduce(into: 0) { $0 += $1 ? 1 : 0 }
        }
        #expect(failures == 32)
    }
}
