import DiskImage
import Testing

@testable import ImageStorage

@Suite struct WriteQueueTests {
    private static func piece(_ range: Range<Int>) -> PendingWrite {
        let memory = UnsafeRawBufferPointer(
            start: UnsafeRawPointer(bitPattern: 4096), count: range.count)
        return PendingWrite(offset: Int64(range.lowerBound), pieces: [memory])
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
        #expect(first?.offset == 0)
        #expect(first?.pieces.map(\.count) == [10, 10, 5])
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
        // Each write is larger than a batch may be, and still has to be written.
        #expect(Self.waiters(&queue) == [0])
        #expect(Self.waiters(&queue) == [1])
        #expect(Self.waiters(&queue) == [2])
        #expect(Self.waiters(&queue) == nil)
    }

    /// The kernel takes at most 1024 pieces in a call.
    @Test func batchesHaveNoMorePiecesThanTheKernelTakes() {
        var queue = WriteQueue<Int>()
        #expect(Self.starts(&queue))
        let memory = UnsafeRawBufferPointer(
            start: UnsafeRawPointer(bitPattern: 4096), count: 100)
        for number in 0..<3 {
            let pieces = [UnsafeRawBufferPointer](repeating: memory, count: 500)
            let write = PendingWrite(offset: Int64(number * 50_000), pieces: pieces)
            #expect(queue.wait(write, number) == false)
        }
        #expect(Self.waiters(&queue) == [0, 1])
        #expect(Self.waiters(&queue) == [2])
    }

    /// Each waiter has to write for itself, once for each write, and there is no writer.
    @Test func theQueueCanBeLeft() {
        var queue = WriteQueue<String>()
        let isWriter = queue.start()
        var others: [Bool] = []
        for (offset, waiter) in [(0, "a"), (8, "b"), (100, "a")] {
            others.append(queue.wait(PendingWrite(offset: Int64(offset), pieces: []), waiter))
        }
        #expect(isWriter && others == [false, false, false])
        let left = queue.stop()
        let isWriterAgain = queue.start()
        #expect(left.sorted() == ["a", "a", "b"] && isWriterAgain)
        #expect(Self.waiters(&queue) == nil)
    }
}
