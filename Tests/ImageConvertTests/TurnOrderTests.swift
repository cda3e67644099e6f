import Testing

@testable import ImageConvert

@Suite struct TurnOrderTests {
    @Test func letsThroughInOrder() {
        var order = TurnOrder<String>()
        #expect(order.isTurn(of: 0) && !order.isTurn(of: 1))
        #expect(order.arrive(2, "two") == .wait)
        #expect(order.arrive(1, "one") == .wait)
        #expect(order.arrive(0, "zero") == .enter)
        #expect(order.advance() == "one")
        #expect(order.advance() == "two")
        #expect(order.advance() == nil)
        #expect(order.arrive(3, "three") == .enter)
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
                    try? await gate.enter(number)
                    seen.append(number)
                    gate.leave()
                }
            }
        }
        #expect(seen.numbers == Array(0..<200))
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
