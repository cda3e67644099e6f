import ImageStorage
import Synchronization
import Testing

@testable import ImageConvert

@Suite struct FetchGateTests {
    /// A queue that is full, with four who wait.
    private func fullQueue(limits: ClosedRange<Int> = 2...5) -> FetchQueue<Int> {
        var queue = FetchQueue<Int>(limits: limits)
        let entered = (1...limits.lowerBound).map { _ in queue.enter() }
        #expect(entered.allSatisfy { $0 })
        let arrived = (1...4).map { queue.arrive($0) }
        #expect(arrived == [false, false, false, false])
        return queue
    }

    @Test func whoWaitedLongestComesFirst() {
        var queue = fullQueue()
        #expect(queue.leave(isFetched: false) == [1])
        #expect(queue.leave(isFetched: false) == [2])
        #expect(queue.waiters == [3, 4])
        #expect(queue.inside == 2)
    }

    @Test func oneMoreComesInForEachVainWait() {
        var queue = fullQueue()
        #expect(queue.passOn(isCompressed: false, isStarved: true) == [1])
        #expect(queue.passOn(isCompressed: false, isStarved: true) == [2])
        #expect(queue.inside == 4)
        // And they stay as many.
        #expect(queue.leave(isFetched: true) == [3])
        #expect(queue.passOn(isCompressed: false, isStarved: true) == [4])
        #expect(queue.inside == 5)
        #expect(queue.arrive(5) == false)
    }

    @Test func theyBecomeFewerWhileOneWrites() {
        var queue = fullQueue()
        #expect(queue.passOn(isCompressed: false, isStarved: true) == [1])
        #expect(queue.passOn(isCompressed: false, isStarved: false) == [])
        #expect(queue.leave(isFetched: true) == [])
        #expect(queue.passOn(isCompressed: false, isStarved: false) == [])
        #expect(queue.leave(isFetched: true) == [2])
        #expect(queue.inside == 2)
    }

    @Test func allComeInToDecompress() {
        var queue = fullQueue()
        #expect(queue.passOn(isCompressed: true, isStarved: false) == [1, 2, 3])
        #expect(queue.leave(isFetched: true) == [4])
        #expect(queue.inside == 5)
    }

    /// How many chunks there are when the first has been passed on, where two are enough and a third worker waits.
    ///
    /// - Parameter isOtherFetched: the second has been passed on before.
    private func chunks(
        turns: TurnGate? = nil, isIdle: Bool = true, isOtherFetched: Bool = false,
        isCompressed: Bool = false
    ) async throws -> Int {
        // The second is passed on where there is no idle core.
        let idle = Mutex(false)
        let gate = FetchGate(limits: 2...8, turns: turns, hasIdleCore: { idle.withLock { $0 } })
        let end = TurnGate()
        return try await withThrowingTaskGroup(of: Void.self) { group in
            var first = await gate.enter()
            for number in 1...2 {
                group.addTask {
                    var pass = await gate.enter()
                    if number == 1, isOtherFetched { pass.passOn(isCompressed: false) }
                    try await end.enter(number)
                    end.leave()
                }
                while gate.counts != (2, isOtherFetched ? 1 : 0, number - 1) {
                    await Task.yield()
                }
            }
            idle.withLock { $0 = isIdle }
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

    @Test func moreComeInWhileNobodyWritesAndACoreIsIdle() async throws {
        #expect(try await chunks() == 3)
        #expect(try await chunks(isIdle: false) == 2)
        #expect(try await chunks(isOtherFetched: true) == 2)
        #expect(try await chunks(isIdle: false, isOtherFetched: true, isCompressed: true) == 3)
    }

    @Test func orderedWritesAreThoseWhoseTurnItIs() async throws {
        let turns = TurnGate()
        // Passed on, but it is not its turn: nobody writes.
        #expect(try await chunks(turns: turns, isOtherFetched: true) == 3)
        try await turns.enter(0)
        #expect(try await chunks(turns: turns) == 2)
        turns.leave()
        #expect(try await chunks(turns: turns) == 3)
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
