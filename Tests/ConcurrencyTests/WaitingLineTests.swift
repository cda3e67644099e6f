import Testing

@testable import Concurrency

@Suite struct WaitingLineTests {
    @Test func oneAtATimeInTheirOrder() {
        var line = WaitingLine<Int>()
        let isFirst = line.enter()
        #expect(isFirst)
        for waiter in 1...3 {
            let isInside = line.arrive(waiter)
            #expect(!isInside)
        }
        for waiter in 1...3 { #expect(line.leave() == waiter) }
        #expect(line.leave() == nil)
        let isInside = line.arrive(4)
        #expect(isInside, "it was left by all")
    }

    /// The caller inside may leave between `enter` and `arrive`.
    @Test func aCallerThatArrivesLateIsInside() {
        var line = WaitingLine<Int>()
        _ = line.enter()
        let isInside = line.enter()
        #expect(!isInside)
        #expect(line.leave() == nil)
        let isLateInside = line.arrive(1)
        #expect(isLateInside)
    }
}
