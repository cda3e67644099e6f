import Synchronization
import Testing

@testable import Concurrency

@Suite struct TurnOrderTests {
    /// Numbers in the order in which tasks reported them.
    private final class Log: Sendable {
        private let list = Mutex<[Int]>([])
        var numbers: [Int] { list.withLock { $0 } }
        func append(_ number: Int) { list.withLock { $0.append(number) } }
    }

    @Test func letsThroughInOrder() {
        var order = TurnOrder<String>()
        let isOneFirst = order.enter(1)
        #expect(!isOneFirst)
        #expect(order.arrive(2, "two") == .wait)
        #expect(order.arrive(1, "one") == .wait)
        #expect(order.arrive(0, "zero") == .enter)
        #expect(order.advance() == "one")
        #expect(order.advance() == "two")
        #expect(order.advance() == nil)
        #expect(order.arrive(3, "three") == .enter)
    }

    @Test func skippedTurnsAreNotWaitedFor() {
        var order = TurnOrder<String>()
        #expect(order.skip(1) == nil)
        #expect(order.skip(2) == nil)
        #expect(order.arrive(3, "three") == .wait)
        #expect(order.arrive(5, "five") == .wait)
        #expect(order.skip(0) == "three")
        #expect(order.advance() == nil)
        #expect(order.skip(4) == "five")
    }

    @Test func skippedAndCancelledTurnsMeet() {
        var order = TurnOrder<String>()
        #expect(order.arrive(2, "two") == .wait)
        #expect(order.skip(1) == nil)
        #expect(order.cancel(2) == "two")
        #expect(order.advance() == nil)
        #expect(order.arrive(2, "two again") == .enter)
    }

    @Test func cancelsWaitersOnce() {
        var order = TurnOrder<String>()
        #expect(order.arrive(1, "one") == .wait)
        #expect(order.cancel(1) == "one")
        #expect(order.cancel(1) == nil)
        #expect(order.advance() == nil)
    }

    @Test func cancelledBeforeArrivalGivesUp() {
        var order = TurnOrder<String>()
        #expect(order.cancel(1) == nil)
        #expect(order.arrive(1, "one") == .giveUp)
    }

    @Test func gateOrdersManyTasks() async throws {
        let gate = TurnGate()
        let seen = Log()
        await withTaskGroup(of: Void.self) { group in
            for number in (0..<200).reversed() {
                group.addTask {
                    guard number % 3 > 0 else { return gate.skip(number) }
                    try? await gate.enter(number)
                    seen.append(number)
                    gate.leave()
                }
            }
        }
        #expect(seen.numbers == (0..<200).filter { $0 % 3 > 0 })
    }

    @Test func gateReleasesCancelledWaiters() async throws {
        let gate = TurnGate()
        await withTaskGroup(of: Bool.self) { group in
            for number in 1..<50 {
                group.addTask {
                    do {
                        try await gate.enter(number)
                        return false
                    } catch {
                        return error is CancellationError
                    }
                }
            }
            await Task.yield()
            group.cancelAll()
            for await wasCancelled in group { #expect(wasCancelled) }
        }
    }
}
