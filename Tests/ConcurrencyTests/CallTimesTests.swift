import Testing

@testable import Concurrency

@Suite struct CallTimesTests {
    private static let read = CallTimes.call(wall: 500_000, work: 500_000, slept: false)
    private static let slowWrite = CallTimes.call(wall: 6_000_000, work: 700_000)

    private func sum(_ calls: [CallTimes]) -> CallTimes {
        calls.reduce(CallTimes()) { $0.faded + $1 }
    }

    @Test func callsThatSleepLongWait() {
        #expect(sum(Array(repeating: Self.slowWrite, count: 4)).isWaiting)
        #expect(!sum(Array(repeating: Self.read, count: 4)).isWaiting)
    }

    /// Each chunk has one of both, and reads of tables come on top.
    @Test func itIsEnoughThatWritesSleep() {
        var calls: [CallTimes] = []
        for number in 0..<20 {
            calls += [Self.slowWrite, Self.read]
            if number % 4 == 3 { calls.append(Self.read) }
        }
        #expect(sum(calls).isWaiting)
    }

    @Test func aHiccupIsNoWaiting() {
        let calls = Array(repeating: Self.read, count: 10)
        #expect(!sum(calls + [.call(wall: 50_000_000, work: 500_000)]).isWaiting)
    }

    /// Four writers that wait for each other's copying.
    @Test func aLockIsNoWaiting() {
        let calls = Array(repeating: CallTimes.call(wall: 2_000_000, work: 500_000), count: 10)
        #expect(!sum(calls).isWaiting)
    }
}
