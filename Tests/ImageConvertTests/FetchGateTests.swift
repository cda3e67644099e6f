import ImageStorage
import Synchronization
import Testing

@testable import ImageConvert

@Suite struct FetchGateTests {
    /// A queue that is full, with four who wait.
    private func fullQueue(
        limits: ClosedRange<Int> = 2...5, decompressing: Int = 3
    ) -> FetchQueue<Int> {
        var queue = FetchQueue<Int>(limits: limits, decompressing: decompressing)
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
        #expect(queue.passOn(isCompressed: false, writer: .starved) == [1])
        // What has been fetched waits for its turn: not yet.
        #expect(queue.passOn(isCompressed: false, writer: .starved) == [])
        #expect(queue.inside == 3)
        // And they stay as many.
        #expect(queue.leave(isFetched: true) == [2])
        #expect(queue.leave(isFetched: true) == [3])
        #expect(queue.passOn(isCompressed: false, writer: .starved) == [4])
        #expect(queue.inside == 4)
    }

    @Test func thereIsAnUpperLimit() {
        var queue = fullQueue(limits: 2...3)
        #expect(queue.passOn(isCompressed: false, writer: .starved) == [1])
        #expect(queue.leave(isFetched: true) == [2])
        #expect(queue.passOn(isCompressed: false, writer: .starved) == [])
        #expect(queue.inside == 3)
    }

    @Test func theyBecomeFewerWhileTheWriterHasPlenty() {
        var queue = fullQueue()
        #expect(queue.passOn(isCompressed: false, writer: .starved) == [1])
        // One that is written and one that waits are no more than it needs.
        for _ in 0..<2 { #expect(queue.passOn(isCompressed: false, writer: .busy) == []) }
        #expect(queue.leave(isFetched: true) == [2])
        #expect(queue.passOn(isCompressed: false, writer: .busy) == [])
        #expect(queue.passOn(isCompressed: false, writer: .busy) == [])
        #expect(queue.leave(isFetched: true) == [])
        #expect(queue.leave(isFetched: true) == [3])
        #expect(queue.inside == 2)
    }

    @Test func theyBecomeFewerWhileTheCoresAreBusy() {
        var queue = fullQueue()
        #expect(queue.passOn(isCompressed: false, writer: .starved) == [1])
        #expect(queue.passOn(isCompressed: false, writer: .idle) == [])
        #expect(queue.leave(isFetched: true) == [])
        #expect(queue.inside == 2)
    }

    @Test func moreComeInToDecompress() {
        var queue = fullQueue(decompressing: 4)
        #expect(queue.passOn(isCompressed: true, writer: .busy) == [1, 2])
        #expect(queue.leave(isFetched: true) == [3])
        #expect(queue.inside == 4)
        // Reads that have to wait can make them even more.
        #expect(queue.passOn(isCompressed: true, writer: .starved) == [4])
        #expect(queue.passOn(isCompressed: true, writer: .busy) == [])
        #expect(queue.inside == 5)
    }

    @Test func noMoreDecompressThanThereMayBe() {
        var queue = fullQueue(limits: 2...3, decompressing: 7)
        #expect(queue.passOn(isCompressed: true, writer: .busy) == [1])
        #expect(queue.inside == 3)
    }

    /// How many chunks there are after one has been passed on, where one is enough and another worker waits.
    private func chunksAfterPassingOn(isWriting: Bool, isIdle: Bool) async throws -> Int {
        let gate = FetchGate(limits: 1...8, isWriting: { isWriting }, hasIdleCore: { isIdle })
        let end = TurnGate()
        return try await withThrowingTaskGroup(of: Void.self) { group in
            var first = await gate.enter()
            group.addTask {
                let pass = await gate.enter()
                try await end.enter(1)
                end.leave()
                _ = consume pass
            }
            while gate.counts != (1, 0, 1) { await Task.yield() }
            first.passOn(isCompressed: false)
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
        #expect(try await chunksAfterPassingOn(isWriting: false, isIdle: true) == 2)
        #expect(try await chunksAfterPassingOn(isWriting: false, isIdle: false) == 1)
        #expect(try await chunksAfterPassingOn(isWriting: true, isIdle: true) == 1)
    }
}
