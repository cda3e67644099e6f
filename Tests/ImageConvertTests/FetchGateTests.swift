import ImageStorage
import Synchronization
import Testing

@testable import ImageConvert

@Suite struct FetchGateTests {
    @Test func whoWaitedLongestComesFirst() {
        var queue = FetchQueue<String>(limit: 2)
        let entered = (0..<3).map { _ in queue.enter() }
        #expect(entered == [true, true, false])
        let arrived = ["one", "two"].map { queue.arrive($0) }
        #expect(arrived == [false, false])
        #expect(queue.waiters == ["one", "two"])
        #expect(queue.leave(isFetched: false) == "one")
        #expect(queue.inside == 2)
        #expect(queue.leave(isFetched: false) == "two")
        #expect(queue.leave(isFetched: false) == nil)
        #expect(queue.inside == 1)
    }

    @Test func whoIsLetInBeyondTheLimitIsNotReplaced() {
        var queue = FetchQueue<String>(limit: 1)
        let arrived = ["zero", "one", "two", "three"].map { queue.arrive($0) }
        #expect(arrived == [true, false, false, false])
        #expect(queue.letOneIn() == "one")
        #expect(queue.inside == 2)
        #expect(queue.leave(isFetched: false) == nil)
        #expect(queue.leave(isFetched: false) == "two")
        #expect(queue.letOneIn() == "three")
        #expect(queue.letOneIn() == nil)
        #expect(queue.inside == 2)
    }

    /// Chunks there are after the first of `limit` has been passed on, while one more waits.
    private func chunksAfterPassingOn(
        limit: Int = 1, isCompressed: Bool = false, turns: TurnGate? = nil, idle: Bool = true,
        others: Int = 0
    ) async throws -> Int {
        let gate = FetchGate(limit: limit, turns: turns, hasIdleCore: { idle })
        let end = TurnGate()
        return try await withThrowingTaskGroup(of: Void.self) { group in
            var first = await gate.enter()
            for number in 1...limit {
                group.addTask {
                    var pass = await gate.enter()
                    if number <= others { pass.passOn(isCompressed: false) }
                    try await end.enter(number)
                    end.leave()
                }
                let inside = min(number + 1, limit)
                let waiting = number + 1 - inside
                while gate.counts != (inside, min(number, others), waiting) { await Task.yield() }
            }
            first.passOn(isCompressed: isCompressed)
            let count = gate.counts.inside
            // Whoever waits comes in now, or this never ends.
            _ = consume first
            end.skip(0)
            try await group.waitForAll()
            #expect(gate.counts == (0, 0, 0))
            return count
        }
    }

    @Test func oneMoreComesInWhileNobodyWrites() async throws {
        #expect(try await chunksAfterPassingOn() == 2)
        #expect(try await chunksAfterPassingOn(idle: false) == 1)
    }

    @Test func nobodyComesInWhileOneWrites() async throws {
        #expect(try await chunksAfterPassingOn(limit: 2) == 3)
        #expect(try await chunksAfterPassingOn(limit: 2, others: 1) == 2)
    }

    @Test func oneMoreComesInToDecompress() async throws {
        #expect(try await chunksAfterPassingOn(limit: 2, isCompressed: true, others: 1) == 3)
        #expect(
            try await chunksAfterPassingOn(limit: 2, isCompressed: true, idle: false, others: 1)
                == 2)
    }

    @Test func orderedWritesAreThoseWhoseTurnItIs() async throws {
        let turns = TurnGate()
        // Passed on, but not yet its turn: nobody writes.
        #expect(try await chunksAfterPassingOn(limit: 2, turns: turns, others: 1) == 3)
        try await turns.enter(0)
        #expect(try await chunksAfterPassingOn(limit: 2, turns: turns) == 2)
        turns.leave()
        #expect(try await chunksAfterPassingOn(limit: 2, turns: turns) == 3)
    }

    @Test func theBuffersUsedLastAreTakenFirst() {
        let pool = BufferPool(dataSize: 4096, encodedSize: 0)
        func address(_ buffers: borrowing ChunkBuffers) -> UInt {
            buffers.data.bytes.withUnsafeBytes { UInt(bitPattern: $0.baseAddress) }
        }
        let one = pool.take()
        let two = pool.take()
        let (first, second) = (address(one), address(two))
        #expect(first != second)
        pool.giveBack(one)
        pool.giveBack(two)
        let three = pool.take()
        let four = pool.take()
        let found = [address(three), address(four)]
        #expect(found == [second, first])
    }
}
