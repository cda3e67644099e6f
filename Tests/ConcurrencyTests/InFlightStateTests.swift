import Testing

@testable import Concurrency

@Suite struct InFlightStateTests {
    @Test func waitsForTheLastOperation() {
        var state = InFlightState<String>()
        #expect(state.arrive("early") == .enter)
        state.begin()
        state.begin()
        #expect(state.arrive("late") == .wait)
        #expect(state.end() == nil)
        #expect(state.end() == "late")
        #expect(state.arrive("next") == .enter)
    }

    @Test func givesUpWhenCancelled() {
        var state = InFlightState<String>()
        state.begin()
        #expect(state.arrive("waits") == .wait)
        #expect(state.cancel() == "waits")
        #expect(state.arrive("later") == .giveUp)
        // The operation ends all the same, and no waiter is resumed twice.
        #expect(state.end() == nil)
    }

    @Test func cancelledBeforeItArrives() {
        var state = InFlightState<String>()
        state.begin()
        #expect(state.cancel() == nil)
        #expect(state.arrive("late") == .giveUp)
    }
}

@Suite struct InFlightCountTests {
    @Test func drainsWhileOthersWork() async throws {
        let count = InFlightCount()
        for _ in 0..<3 { count.begin() }
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask { try await count.drain() }
            for _ in 0..<3 {
                group.addTask {
                    await Task.yield()
                    count.end()
                }
            }
            try await group.waitForAll()
        }
    }

    @Test func aCancelledCallerDoesNotWait() async {
        let count = InFlightCount()
        count.begin()
        let task = Task { try await count.drain() }
        task.cancel()
        await #expect(throws: CancellationError.self) { try await task.value }
    }
}
